"""Which pictures are opened: the one list, for training data, validation images and the pages that show them.

Pillow by itself opens more than forty formats. One of them, EPS, it hands to Ghostscript, which runs it as a program.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import PIL.Image

from shared.untrusted.files import MIB, open_file, read_file
from shared.untrusted.text import shown
from shared.user_errors import UserError

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "AVIF", "JPEG2000")
"""Pillow's names. MPO is what many cameras write into a .jpg. All are decoded by libraries that only decode."""

LARGEST_FILE = 768 * MIB
"""More than the most pixels that are allowed need: 89 million of 8 bytes each are 683 MiB."""

_LONGEST_SIDE = 1_000_000  # pixels; JPEG ends at 65,535

_SIGNATURES = (  # of what people do have in such folders, for the message
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
    (b"<!DOCTYPE", "HTML"),
    (b"<html", "HTML"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"SIMPLE  =", "FITS"),
    (b"version https://git-lfs", "a Git LFS pointer"),
)


def open_picture(source: bytes | Path) -> PIL.Image.Image:
    """Open a picture without decoding it; the caller looks at its size before it does.

    Raises:
        UserError: the file cannot be read, is too large, or is of a format that is not in `FORMATS`, which the message
            names where it is known.
        Exception: what Pillow's readers raise on damaged files.
    """
    content = source if isinstance(source, bytes) else read_file(source, LARGEST_FILE)
    if len(content) > LARGEST_FILE:
        raise UserError(f"it has {len(content):,} bytes, more than any honest picture")
    try:
        return PIL.Image.open(io.BytesIO(content), formats=_available())
    except PIL.UnidentifiedImageError:
        raise UserError(f"{_format_of(content[:64])}; expected one of {', '.join(_available())}") from None


@contextmanager
def opened_header(source: bytes | Path) -> Iterator[PIL.Image.Image]:
    """A picture of which only what stands before its pixels is read. Of bytes, the first ones may do.

    Raises:
        UserError: the file cannot be read, or is too large.
        Exception: what Pillow's readers raise on damaged files, and on other formats than those in `FORMATS`.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open_file(source) as file:
        if file.seek(0, io.SEEK_END) > LARGEST_FILE:
            raise UserError(f"it has more than {LARGEST_FILE:,} bytes, more than any honest picture")
        file.seek(0)
        with PIL.Image.open(file, formats=_available()) as opened:
            yield opened


def check_pixels(width: int, height: int) -> None:
    """Raises UserError for more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, where Pillow begins to warn of a bomb.

    And for a side that no picture has: Pillow keeps a pointer and a padded line for every row, which took 3 GiB for a
    picture of one column.
    """
    if max(width, height) > _LONGEST_SIDE:
        raise UserError(f"it has {width}x{height} pixels, more than {_LONGEST_SIDE:,} on a side")
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise UserError(f"it has {width}x{height} pixels, more than the {limit} allowed (a decompression bomb?)")


def _available() -> list[str]:
    """What of the list this build of Pillow knows; asking it for another is an error."""
    PIL.Image.init()
    return [name for name in FORMATS if name in PIL.Image.OPEN]


def _format_of(beginning: bytes) -> str:
    if not beginning:
        return "it is empty"
    for signature, name in _SIGNATURES:
        if beginning.lstrip()[: len(signature)].lower() == signature.lower() or beginning.startswith(signature):
            return f"it is {name}, which is not opened"
    if beginning[4:8] == b"ftyp":
        return f"it is of the kind {shown(beginning[8:12].decode('latin-1'))}, which is not opened"
    return f"it is no picture of a known format (it begins with {beginning[:8]!r})"
