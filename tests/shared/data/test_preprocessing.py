import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.data.decoded_pairs import PairDecoder
from shared.data.preprocessing import decode, preprocess
from shared.data.sample import BadSampleError, RawSample
from shared.data.views import resized_size
from tests.shared.data.pictures import config, png


def encoded(image: PIL.Image.Image, format_: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # torchvision: the shorter side becomes 32, the longer int(32 * long / short).
        ((32, 32), (32, 32)),
        ((64, 48), (42, 32)),  # 42.67 truncated
        ((48, 64), (32, 42)),
        ((100, 99), (32, 32)),
        ((20, 30), (32, 48)),
        ((31, 95), (32, 98)),  # 98.06
    ],
)
def test_the_longer_side_is_truncated(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(*size, 32, 32) == expected


@pytest.mark.parametrize(
    ("width", "left"),
    # torchvision: int(round((width - 32) / 2)), and Python rounds halves to even.
    [(32, 0), (33, 0), (34, 1), (35, 2), (36, 2), (37, 2), (39, 4)],
)
def test_the_centre_is_rounded_half_to_even(width: int, left: int) -> None:
    image = PIL.Image.open(io.BytesIO(png(0, width, 32)))
    cropped = preprocess(png(0, width, 32), 32, "bilinear")
    np.testing.assert_array_equal(cropped, np.asarray(image)[:, left : left + 32])


def test_bilinear_is_antialiased_as_a_hand_computed_triangle_filter() -> None:
    """A 4x reduction: each output pixel is a triangle, 8 inputs wide, about its centre, in both directions."""
    size, resolution = 64, 16
    weights = np.maximum(0, 1 - np.abs((np.arange(size) + 0.5)[None] - (np.arange(resolution) * 4 + 2)[:, None]) / 4)
    weights /= weights.sum(axis=1, keepdims=True)
    data = png(3, size, size)
    pixels = np.asarray(PIL.Image.open(io.BytesIO(data))).astype(np.float64)
    expected = np.einsum("yY,xX,YXc->yxc", weights, weights, pixels)
    actual = preprocess(data, resolution, "bilinear")
    assert actual.dtype == np.uint8
    assert actual.shape == (resolution, resolution, 3)
    assert np.abs(actual - expected).max() <= 1.0  # PIL rounds to 8 bits after each direction


@pytest.mark.parametrize("mode", ["nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_every_mode_agrees_with_pil_alone(mode: str) -> None:
    data = png(4, 64, 48)
    filter_ = PIL.Image.Resampling["NEAREST" if mode.startswith("nearest") else mode.upper()]
    expected = PIL.Image.open(io.BytesIO(data)).resize((42, 32), filter_).crop((5, 0, 37, 32))
    np.testing.assert_array_equal(preprocess(data, 32, mode), np.asarray(expected))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("size", "top", "left"),
    # diffusers' train_text_to_image_sdxl.py: max(0, int(round((side - 32) / 2.0))) of the resized sides.
    [((32, 32), 0, 0), ((64, 48), 0, 5), ((48, 65), 6, 0), ((95, 31), 0, 33), ((20, 30), 8, 0), ((33, 32), 0, 0)],
)
def test_sizes_say_what_was_cut_from_what(size: tuple[int, int], top: int, left: int, orientation: int) -> None:
    """PIL alone gets the same pixels from them. A camera that was turned stores the picture on its side."""
    upright = PIL.Image.open(io.BytesIO(png(7, *size)))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(PIL.Image.Transpose.ROTATE_90) if orientation == 6 else upright
    data = encoded(stored, exif=exif.tobytes())
    pair = PairDecoder(config())(RawSample(data, (data,), ("a",), "a pair"))
    assert pair.sizes == (upright.height, upright.width, top, left, 32, 32)
    scale = 32 / min(upright.size)
    resized = upright.resize((int(scale * upright.width + 1e-9), int(scale * upright.height + 1e-9)), 2)
    assert pair.pixels is not None
    expected = np.asarray(resized)[top : top + 32, left : left + 32]
    assert np.abs(pair.pixels.astype(int) - expected).max() <= 1  # Pillow may begin with the rows


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match=r"--image_interpolation_mode is 'cubic'; use one of nearest, .*lanczos"):
        preprocess(png(0, 8, 8), 8, "cubic")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.asarray(PIL.Image.open(io.BytesIO(png(5, 6, 4))))
    # What a camera with this orientation stores for an upright picture (EXIF 2.3, tag 0x0112).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PIL.Image.fromarray(np.ascontiguousarray(stored)), exif=exif.tobytes())
    np.testing.assert_array_equal(np.asarray(decode(data)), upright)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(mode: str) -> None:
    image = PIL.Image.open(io.BytesIO(png(6, 9, 7))).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(image.convert("RGB")))


def test_16_bit_depth_maps_are_scaled_not_clipped() -> None:
    depth = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    expected = np.repeat(np.array([[0, 1, 128, 255]], dtype=np.uint8)[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(decode(encoded(PIL.Image.fromarray(depth)))), expected)


def test_32_bit_images_have_no_known_range() -> None:
    data = encoded(PIL.Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")
    with pytest.raises(BadSampleError, match="32-bit pixels"):
        decode(data)


@pytest.mark.parametrize("side", [10_000, 30_000])  # where PIL warns, and where it raises
def test_decompression_bombs_are_bad_samples(side: int) -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(BadSampleError, match=r"decompression bomb|pixels"):
        decode(bomb)


def test_a_bomb_made_of_its_aspect_ratio_is_a_bad_sample() -> None:
    with pytest.raises(BadSampleError, match="512x30720000 pixels"):
        preprocess(encoded(PIL.Image.new("L", (1, 60_000))), 512, "bilinear")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match=r"absent\.png"):
        decode(tmp_path / "absent.png")


def test_paths_bytes_urls_and_drawn_images_decode_alike(tmp_path: Path) -> None:
    data = png(7, 5, 5)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    drawn = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    for image in (data, path, str(path), path.as_uri(), drawn):
        np.testing.assert_array_equal(np.asarray(decode(image)), np.asarray(drawn))


FILES = [png(8, 12, 9)] + [
    encoded(PIL.Image.open(io.BytesIO(png(8, 12, 9))), format_) for format_ in ("JPEG", "WEBP", "GIF", "TIFF", "BMP")
]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # PIL remarks on damaged metadata and decodes on
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    st.integers(0, 10**6),
)
@example(FILES[0], [], 40)
def test_damaged_files_decode_or_are_bad_samples(data: bytes, changes: list[tuple[int, int]], length: int) -> None:
    damaged = bytearray(data)
    for where, value in changes:
        damaged[where % len(damaged)] = value
    try:
        pixels = preprocess(bytes(damaged[: length % (2 * len(damaged))]), 8, "bilinear")
    except BadSampleError:
        return
    assert pixels.shape == (8, 8, 3)
