"""PNG files written by Pillow and by hand, against Pillow's reading of them."""

import io
import itertools
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.pixels import plain_pixels
from shared.data.preprocessing import decode, decode_picture
from shared.data.sample import BadSampleError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KINDS = {0: 1, 2: 3}
"""Channels of PNG's colour types grey and truecolour."""


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    rows: bytes, width: int, height: int, kind: int = 2, *, split: int = 2**30, before: bytes = b"", after: bytes = b""
) -> bytes:
    """Of rows that are filtered already. Any bytes are a picture, whatever the filters make of them."""
    compressed = zlib.compress(rows)
    parts = (compressed[start : start + split] for start in range(0, len(compressed), split))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    pixels = b"".join(chunk(b"IDAT", part) for part in parts)
    return SIGNATURE + header + before + pixels + after + chunk(b"IEND", b"")


def random_rows(width: int, height: int, kind: int, filters: list[int], seed: int = 0) -> bytes:
    generator = np.random.default_rng(seed)
    # Small differences, which keep the filters near each other, and large ones, which overflow.
    added = np.where(generator.random((height, width * KINDS[kind])) < 0.5, generator.integers(0, 3), 256)
    added = generator.integers(0, added + 1).astype(np.uint8)
    return b"".join(
        bytes([filter_]) + row.tobytes() for filter_, row in zip(itertools.cycle(filters), added, strict=False)
    )


def opened(content: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(content))


def saved(image: PIL.Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def by_pillow(content: bytes) -> np.ndarray:
    pixels = np.asarray(opened(content))
    return pixels.reshape(*pixels.shape[:2], -1)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from(list(KINDS)),
    st.lists(st.integers(0, 4), min_size=1, max_size=8),
    st.sampled_from([1, 7, 2**30]),
    st.integers(0, 2**31),
)
def test_every_filter_in_any_order(
    width: int, height: int, kind: int, filters: list[int], split: int, seed: int
) -> None:
    content = png(random_rows(width, height, kind, filters, seed), width, height, kind, split=split)
    pixels = plain_pixels(opened(content))
    assert pixels is not None
    np.testing.assert_array_equal(pixels, by_pillow(content))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [{}, {"compress_level": 0}, {"optimize": True}, {"dpi": (72, 72)}])
def test_what_pillow_writes(mode: str, options: dict[str, object]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    content = saved(PIL.Image.fromarray(pixels).convert(mode), **options)
    read = plain_pixels(opened(content))
    assert read is not None
    np.testing.assert_array_equal(read, by_pillow(content))


def turned(after: bool) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    part = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    return png(random_rows(6, 4, 2, [1]), 6, 4, **{"after" if after else "before": part})


def with_text(key: str) -> bytes:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt(key, '<x tiff:Orientation="6"/>')
    return saved(PIL.Image.new("RGB", (6, 4)), pnginfo=info)


def animated() -> bytes:
    file, frames = io.BytesIO(), [PIL.Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    return file.getvalue()


RGB = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8))
NOT_PLAIN = {
    "palette": saved(RGB.convert("P")),
    "one bit": saved(RGB.convert("1")),
    "grey and alpha": saved(RGB.convert("LA")),
    "alpha": saved(RGB.convert("RGBA")),
    "16 bits": saved(PIL.Image.fromarray(np.full((4, 6), 300, np.uint16))),
    "an orientation": turned(after=False),
    "an orientation after the pixels": turned(after=True),
    "an orientation in XMP": with_text("XML:com.adobe.xmp"),
    "two frames": animated(),
    "an empty IDAT": png(random_rows(6, 4, 2, [0]), 6, 4, before=chunk(b"IDAT", b"")),
    "text after the pixels": png(random_rows(6, 4, 2, [0]), 6, 4, after=chunk(b"tEXt", b"date\0today")),
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_not_plain_is_read_by_pillow(kind: str) -> None:
    content = NOT_PLAIN[kind]
    assert plain_pixels(opened(content)) is None
    np.testing.assert_array_equal(
        np.broadcast_to(decode_picture(content).pixels, (*decode(content).size[::-1], 3)), np.asarray(decode(content))
    )


def test_bytes_beyond_the_picture_do_not_matter() -> None:
    rows = random_rows(6, 4, 2, [4])
    content = png(rows + bytes(50), 6, 4)
    assert plain_pixels(opened(content)) is None
    np.testing.assert_array_equal(decode_picture(content).pixels, by_pillow(png(rows, 6, 4)))


def test_a_picture_of_too_few_rows_is_what_pillow_makes_of_it() -> None:
    content = png(random_rows(6, 4, 2, [0]), 6, 9)
    assert plain_pixels(opened(content)) is None
    np.testing.assert_array_equal(decode_picture(content).pixels, by_pillow(content))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(random_rows(6, 4, 2, [5]), 6, 4), "cannot be decoded"),
        (png(random_rows(6, 4, 2, [0]), 6, 4)[:-30], "truncated"),
    ],
)
def test_pillow_says_what_is_wrong(content: bytes, reason: str) -> None:
    assert plain_pixels(opened(content)) is None
    with pytest.raises(BadSampleError, match=reason) as one:
        decode_picture(content)
    with pytest.raises(BadSampleError) as other:
        decode(content)
    assert str(one.value) == str(other.value)


def test_a_file_of_very_many_chunks_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    content = png(random_rows(6, 4, 2, [2]), 6, 4, split=1)
    assert plain_pixels(opened(content)) is not None
    monkeypatch.setattr("shared.data.pixels.png._MOST_CHUNKS", 3)
    assert plain_pixels(opened(content)) is None
