"""Pictures that no training needs: programs, bombs, rare formats, rare modes, and every format damaged."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import PIL.Image

from tests.hostile.case import FORGED, Case
from tests.hostile.mutations.binary import mutated_bytes, random_bytes
from tests.hostile.mutations.values import hostile_text, pick

_SIDE = 40
_BOMB_SIDES = ((60_000, 60_000), (20_000, 20_000), (9_400, 9_400), (1, 400_000), (400_000, 1), (2**31 - 1, 1), (0, 0))


def hostile_picture(case: Case) -> tuple[str, bytes]:
    """What it is, in words, and the file."""
    name, make = pick(case, _PICTURES)
    return name, make(case)


def honest_picture(case: Case, kind: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    """Noise, so that compressed files have something in them."""
    pixels = case.rng.integers(0, 256, (_SIDE, _SIDE + 7, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


# --- programs --------------------------------------------------------------------------------------------------------


def _eps(program: str) -> Callable[[Case], bytes]:
    def make(case: Case) -> bytes:
        text = program.replace("EXECUTED", str(case.executed)).replace("OUTSIDE", str(case.outside))
        return (
            "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%LanguageLevel: 2\n%%Pages: 1\n%%EndComments\n"
            f"%%BeginProlog\n%%EndProlog\n{text}\nshowpage\n%%Trailer\n%%EOF\n"
        ).encode()

    return make


_WRITES = "(EXECUTED) (w) file dup (x) writestring closefile"
_READS = "(OUTSIDE/secret.txt) (r) file 100 string readline pop ="


def eps_that_writes(case: Case) -> bytes:
    """Ghostscript, where it is asked to draw this, leaves the file that says that code was executed."""
    return _eps(_WRITES)(case)


def _dos_eps(case: Case) -> bytes:
    body = eps_that_writes(case)
    return struct.pack("<4sLLLLLLH", b"\xc5\xd0\xd3\xc6", 30, len(body), 0, 0, 0, 0, 0xFFFF) + body


def _svg(case: Case) -> bytes:
    return f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{case.outside}/private.png"/></svg>'.encode()


def _in_memory_list(case: Case) -> bytes:
    return f"# ImageMagick\nviewbox 0 0 40 40\nimage over 0,0 0,0 '|touch {case.executed}'\n".encode()


# --- PNG -------------------------------------------------------------------------------------------------------------


def png(
    width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"", depth: int = 8, colour: int = 2
) -> bytes:
    """A PNG file as its parts say."""
    header = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    row = b"\x00" + bytes(3 * _SIDE)
    return png(_SIDE, _SIDE, *chunks, data=row * _SIDE)


def _png_bomb(case: Case) -> bytes:
    width, height = pick(case, _BOMB_SIDES)
    return png(width, height, data=b"\x00" * 100_000)


def _png_of_black(case: Case) -> bytes:
    """Whole: 89 million pixels are allowed, 400 million are not; either has some 100 kB."""
    side = pick(case, (9_000, 9_459, 9_460, 20_000))
    return png(side, side, data=bytes((side // 8 + 2) * side), depth=1, colour=0)


def _png_with_long_texts(case: Case) -> bytes:
    text = b"key\x00\x00" + zlib.compress(b"x" * 60_000_000)
    return _png_with(*[(pick(case, (b"zTXt", b"iTXt")), text)] * 20)


def _png_with_swelling_profile(case: Case) -> bytes:
    return _png_with((b"iCCP", b"p\x00\x00" + zlib.compress(b"\x00" * 200_000_000)))


def _png_with_forged_text(case: Case) -> bytes:
    return _png_with((b"tEXt", b"Comment\x00" + hostile_text(case)[:5000].encode("utf-8", "replace")))


def _png_with_orientation(case: Case) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = pick(case, (1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65535))
    exif[0x010E] = hostile_text(case)[:2000].encode("ascii", "replace").decode()
    content = exif.tobytes()
    return honest_picture(case, "PNG", exif=content if case.chance(0.5) else content[: case.below(len(content))])


def _animated_png(case: Case) -> bytes:
    frames = struct.pack(">II", pick(case, (0, 1, 10**6, 2**31 - 1, 2**32 - 1)), 0)
    return _png_with((b"acTL", frames), (b"fcTL", random_bytes(case, 26)))


# --- others ----------------------------------------------------------------------------------------------------------


def _in_format(kind: str, mode: str = "RGB", **options: object) -> Callable[[Case], bytes]:
    return lambda case: honest_picture(case, kind, mode, **options)


def _damaged(kind: str, mode: str = "RGB") -> Callable[[Case], bytes]:
    return lambda case: mutated_bytes(case, honest_picture(case, kind, mode))


def _animation(kind: str) -> Callable[[Case], bytes]:
    def make(case: Case) -> bytes:
        frames = [PIL.Image.new("RGB", (8, 8), (index % 256, 0, 0)) for index in range(300)]
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        return file.getvalue()

    return make


def _large_screen_gif(case: Case) -> bytes:
    content = bytearray(honest_picture(case, "GIF", "P"))
    content[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(content)


def _large_jpeg(case: Case) -> bytes:
    content = honest_picture(case, "JPEG")
    frame = content.index(b"\xff\xc0")
    return content[: frame + 5] + struct.pack(">HH", 65500, 65500) + content[frame + 9 :]


def _large_bmp(case: Case) -> bytes:
    content = bytearray(honest_picture(case, "BMP"))
    content[18:26] = struct.pack(
        "<ii", pick(case, (2**31 - 1, 9_000, -40)), pick(case, (2**31 - 1, -(2**31), 9_000, 0))
    )
    return bytes(content)


def _ppm(case: Case) -> bytes:
    header = pick(
        case,
        (
            b"P6 999999999 999999999 255\n",
            b"P6 -1 40 255\n",
            b"P6 40 40 65535\n",
            b"P3 9000 9000 255\n",
            b"P7\n",
            b"P6 40 40 0\n",
            b"P6 4\xff 40 255\n",
            b"P6 " + b"9" * 10_000 + b" 1 255\n",
            b"P5 1 89000000 255\n",
            b"Pf\n9 9\n-1\n",
        ),
    )
    return header + random_bytes(case, 5000)


def _tiff(case: Case) -> bytes:
    """One directory of entries as the case chances them."""
    count = pick(case, (1, 12, 12, 12, 500))
    tags = (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 320, 322, 323, 324, 325, 338, 339, 347, 700, 34665)
    values = (0, 1, 3, 5, 7, 8, 16, 40, 50_000, 2**31, 2**32 - 1, 34712, 32773, 4)
    entries = b"".join(
        struct.pack(
            "<HHII",
            pick(case, tags),
            pick(case, (1, 2, 3, 4, 5, 7, 12, 16, 99)),
            pick(case, (1, 1, 3, 2**31)),
            pick(case, values),
        )
        for _ in range(count)
    )
    following = pick(case, (0, 8, 2**32 - 1))  # 8: round in a circle
    return b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", count) + entries + struct.pack("<I", following) + bytes(500)


def _text(content: str) -> Callable[[Case], bytes]:
    return lambda case: content.encode("utf-8", "surrogatepass")


def _magic(content: bytes) -> Callable[[Case], bytes]:
    """Of a format that some plugin knows, and no more of it than a little noise."""
    return lambda case: content + random_bytes(case, 2000)


_PICTURES: tuple[tuple[str, Callable[[Case], bytes]], ...] = (
    ("EPS that writes a file", eps_that_writes),
    ("EPS that writes a file", eps_that_writes),
    ("EPS that reads a file", _eps(_READS)),
    ("EPS that never ends", _eps("{} loop")),
    ("EPS that fails", _eps("undefined-operator")),
    ("EPS as DOS writes it", _dos_eps),
    ("SVG", _svg),
    ("MVG", _in_memory_list),
    ("HTML", _text("<!DOCTYPE html><script>alert(1)</script>")),
    ("text", _text(f"{FORGED}\n\x1b[31m{FORGED}")),
    ("Git LFS pointer", _text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")),
    ("PNG bomb", _png_bomb),
    ("PNG bomb", _png_bomb),
    ("large black PNG", _png_of_black),
    ("PNG with texts that swell", _png_with_long_texts),
    ("PNG with a profile that swells", _png_with_swelling_profile),
    ("PNG with forged text", _png_with_forged_text),
    ("PNG with EXIF", _png_with_orientation),
    ("animated PNG", _animated_png),
    ("PNG, 16 bits", _in_format("PNG", "I;16")),
    ("PNG, palette", _in_format("PNG", "P")),
    ("PNG, 1 bit", _in_format("PNG", "1")),
    ("PNG, grey and alpha", _in_format("PNG", "LA")),
    ("TIFF, 32 bits", _in_format("TIFF", "F")),
    ("TIFF, Lab", _in_format("TIFF", "LAB")),
    ("TIFF, CMYK, compressed", _in_format("TIFF", "CMYK", compression="tiff_lzw")),
    ("TIFF of chance", _tiff),
    ("TIFF of chance", _tiff),
    ("JPEG, CMYK", _in_format("JPEG", "CMYK")),
    ("JPEG, huge", _large_jpeg),
    ("GIF, huge screen", _large_screen_gif),
    ("BMP, huge", _large_bmp),
    ("PPM", _ppm),
    ("animated GIF", _animation("GIF")),
    ("animated WebP", _animation("WEBP")),
    *(
        (f"damaged {kind}", _damaged(kind))
        for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000")
    ),
    *((f"damaged {kind}", _damaged(kind)) for kind in ("PNG", "JPEG", "WEBP", "AVIF", "JPEG2000")),
    ("damaged GIF", _damaged("GIF", "P")),
    *((kind, _in_format(kind)) for kind in ("ICO", "ICNS", "PCX", "TGA", "SGI", "IM", "PDF", "DDS", "QOI", "EPS")),
    ("XBM", _in_format("XBM", "1")),
    ("MSP", _in_format("MSP", "1")),
    ("PSD", _magic(b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 40, 40, 8, 3))),
    ("FITS", _magic(b"SIMPLE  =                    T" + b" " * 50 + b"END" + b" " * 77)),
    ("WMF", _magic(b"\xd7\xcd\xc6\x9a\x00\x00")),
    ("FLI", _magic(struct.pack("<IHHHHHH", 2000, 0xAF12, 1000, 40, 40, 8, 3) + bytes(112))),
    ("FPX", _magic(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")),
    ("MPEG", _magic(b"\x00\x00\x01\xb3\x02\x80\x02\x80")),
    ("HDF5", _magic(b"\x89HDF\r\n\x1a\n")),
    ("GRIB", _magic(b"GRIB" + bytes(3) + b"\x01")),
    ("Sun raster", _magic(struct.pack(">8I", 0x59A66A95, 40, 40, 24, 4800, 1, 0, 0))),
    ("XPM", _text('/* XPM */\nstatic char *x[] = {\n"40 40 99999999 9",\n"a c #000000",\n')),
    ("HEIF", _magic(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic")),
    ("JPEG XL", _magic(b"\x00\x00\x00\x0cJXL \r\n\x87\n")),
    ("video", _magic(b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom")),
)
