"""Data as somebody who means harm, or a broken disk, would leave it: builders for tests."""

import gzip
import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import PIL.Image

from tests.shared.data.pictures import png

Members = Iterable[tuple[str, bytes]]


def eps_that_writes(canary: Path) -> bytes:
    """An EPS file whose program, where Ghostscript runs it, writes a file."""
    return (
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
        f"({canary}) (w) file dup (ran) writestring closefile\nshowpage\n%%EOF\n"
    ).encode()


def in_format(name: str) -> bytes:
    """A small picture in one of Pillow's formats."""
    file = io.BytesIO()
    PIL.Image.open(io.BytesIO(png(0, 8, 8))).save(file, name)
    return file.getvalue()


UNOPENED: dict[str, tuple[Callable[[], bytes], str]] = {
    "PDF": (lambda: b"%PDF-1.7\n", "it is PDF, which is not opened"),
    "PSD": (lambda: b"8BPS\0\1" + bytes(40), "it is PSD, which is not opened"),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is SVG, which is not opened"),
    "ICO": (lambda: in_format("ICO"), "it is ICO, which is not opened"),
    "HTML": (lambda: b"<!DOCTYPE html><p>404</p>", "it is HTML, which is not opened"),
    "LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer, which is not opened"),
    "PCX": (lambda: in_format("PCX"), "it is no picture of a known format"),
    "SGI": (lambda: in_format("SGI"), "it is no picture of a known format"),
    "text": (lambda: b"not a picture", "it is no picture of a known format"),
    "nothing": (lambda: b"", "it is empty"),
}
"""Contents that are not opened, each with the beginning of the reason."""


# Tars


def header(name: str = "0.image.png", size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar's header, with a right checksum."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    """A member's content, filled up to whole blocks."""
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def tar(members: Members, end: bool = True) -> bytes:
    """A tar of regular files."""
    blocks = b"".join(header(name, len(content)) + padded(content) for name, content in members)
    return blocks + bytes(2 * tarfile.BLOCKSIZE) * end


def sample(key: str = "0", caption: bytes = b"a dog", caption_key: str = "text.txt") -> list[tuple[str, bytes]]:
    """The members of a good sample, unless its caption is not."""
    return [
        (f"{key}.image.png", png(0, 8, 8)),
        (f"{key}.conditioning_image.png", png(1, 8, 8)),
        (f"{key}.{caption_key}", caption),
    ]


def pax(**records: str) -> bytes:
    """A header extension in the form of POSIX."""
    content = b""
    for key, value in records.items():
        record = f" {key.replace('__', '.')}={value}\n".encode()
        length = next(n for n in range(len(record), len(record) + 20) if n == len(record) + len(str(n)))
        content += str(length).encode() + record
    return header("pax", len(content), tarfile.XHDTYPE) + padded(content)


GOOD = tar(sample(), end=False)

DAMAGED_TARS: dict[str, bytes] = {
    "empty": b"",
    "no tar": b"nonsense" * 200,
    "shorter than a header": b"nonsense",
    "a PAX header of a terabyte": GOOD + header("x", 10**12, tarfile.XHDTYPE) + padded(b"9 a=b\n"),
    "a global PAX header of a terabyte": header("x", 10**12, tarfile.XGLTYPE) + padded(b"9 a=b\n"),
    "a long name of a terabyte": GOOD + header("x", 10**12, tarfile.GNUTYPE_LONGNAME) + padded(b"name"),
    "a PAX header of digits": GOOD + header("x", 2**20, tarfile.XHDTYPE) + b"1" * 2**20,
    "a PAX record beyond its header": GOOD + header("x", 20, tarfile.XHDTYPE) + padded(b"99 path=a.image.png\n"),
    "a PAX record of no length": GOOD + header("x", 20, tarfile.XHDTYPE) + padded(b"0 path=a.image.png\n"),
    "a PAX size that is no number": pax(size="many") + GOOD,
    "a PAX size of a terabyte": pax(size=str(10**12)) + GOOD,
    "a PAX size of 400 digits": pax(size="9" * 400) + GOOD,
    "extensions without end": pax(comment="x") * 5000 + GOOD,
    "a sparse member": GOOD + header("1.image.png", 10, tarfile.GNUTYPE_SPARSE) + padded(b"0123456789"),
    "a sparse member of a terabyte in PAX": pax(GNU__sparse__major="1", GNU__sparse__size=str(10**12)) + GOOD,
    "a member of a terabyte": GOOD + header("1.image.png", 10**12) + padded(b"x"),
    "a member of a negative size": GOOD + header("1.image.png", -512) + bytes(1024),
    "cut in a header": GOOD + header("1.image.png", 10)[:100],
    "cut in a member": GOOD + header("1.image.png", 10000) + padded(b"x"),
    "a damaged header": GOOD + b"\xff" * 512 + bytes(1024),
    "a member twice": tar([*sample(), ("0.image.png", b"")]),
    "a size that is no number": header("0.image.png", 5)[:124] + b"not a number" + header("0.image.png", 5)[136:],
    "ten thousand members of one sample": tar([*sample(), *((f"0.{i}", b"") for i in range(10_001))]),
}
"""Tars that are an error, whether they come as a file or as a stream."""


def gzip_of_zeros(path: Path, size: int, name: str = "0.image.png") -> Path:
    """A .tar.gz with a member of `size` zeros, which are written without being held."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header(name, size))
        block = bytes(2**24)
        for _ in range(size // len(block)):
            file.write(block)
        file.write(bytes(size % len(block)) + bytes(-size % tarfile.BLOCKSIZE + 1024))
    return path
