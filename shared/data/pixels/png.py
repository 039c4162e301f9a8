"""PNG files as most are, decoded several times as fast as by Pillow, to the same pixels.

Reference: Portable Network Graphics (PNG) Specification, third edition (W3C 2025), 5 "Datastream structure".

Pillow has opened the file and judged all that stands before its pixels. libdeflate inflates them, and finds out whether
they are whole. Whatever is less plain or damaged is left to Pillow, whose verdict on a file counts.

Axes: H height, W width, C channels.
"""

import io
from collections.abc import Iterator

import deflate
import numpy as np
import numpy.typing as npt
from PIL.PngImagePlugin import PngImageFile

from shared.data.pixels.png_filters import unfiltered

_CHANNELS = {"L": 1, "RGB": 3}
_MAY_TELL_ORIENTATION = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
_MOST_CHUNKS = 100_000  # some programs write one for every 8 KiB


def plain_png(opened: PngImageFile) -> npt.NDArray[np.uint8] | None:
    """The pixels of a PNG file that Pillow has opened, but not read: of 8 bits, grey or RGB, in the order of rows.

    Args:
        opened: from a file in memory.

    Returns:
        uint8 [H,W,C] of 1 channel or 3; None for a picture that Pillow has to read, with its file as it was.

    Raises:
        MemoryError: there is not enough for the picture.
    """
    if not _is_plain(opened):
        return None
    assert isinstance(opened.fp, io.BytesIO)
    compressed = _compressed_pixels(opened.fp.getvalue(), opened.tile[0].offset)
    if compressed is None:
        return None
    channels = _CHANNELS[opened.mode]
    row_bytes = 1 + opened.width * channels  # the first names the row's filter
    try:
        rows = deflate.zlib_decompress(compressed, opened.height * row_bytes)
    except deflate.DeflateError:
        return None
    if len(rows) != opened.height * row_bytes:
        return None
    pixels = unfiltered(np.frombuffer(rows, np.uint8).reshape(opened.height, row_bytes), channels)
    return None if pixels is None else pixels.reshape(opened.height, opened.width, channels)


def _is_plain(opened: PngImageFile) -> bool:
    """Whether the file holds one picture, upright, in the very bytes that Pillow would give."""
    if opened.mode not in _CHANNELS or opened.custom_mimetype is not None or "interlace" in opened.info:
        return False
    if any(name in opened.info for name in _MAY_TELL_ORIENTATION):
        return False
    whole = (0, 0, opened.width, opened.height)
    return [(tile.codec_name, tile.extents, tile.args) for tile in opened.tile] == [("zip", whole, opened.mode)]


def _compressed_pixels(content: bytes, first: int) -> bytes | memoryview | None:
    """What the IDAT chunks hold, the first one's content beginning at `first`; None if IEND does not follow them.

    Other chunks could turn the picture (eXIf), or have Pillow refuse it.
    """
    parts: list[memoryview] = []
    for name, part in _chunks(content, first - 8):
        if name == b"IEND":
            return parts[0] if len(parts) == 1 else b"".join(parts)
        if name != b"IDAT" or not part:
            return None
        parts.append(part)
    return None


def _chunks(content: bytes, position: int) -> Iterator[tuple[bytes, memoryview]]:
    """(name, content) of the complete chunks from there on, up to many."""
    view = memoryview(content)
    for _ in range(_MOST_CHUNKS):
        begin = position + 8
        end = begin + int.from_bytes(view[position : position + 4], "big")
        if begin > len(view) or end > len(view):
            return
        yield bytes(view[position + 4 : begin]), view[begin:end]
        position = end + 4  # over the checksum, which Pillow does not read here either
