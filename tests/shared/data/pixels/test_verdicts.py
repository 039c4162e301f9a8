"""Whatever a file is, and however damaged: the pixels and the verdict of Pillow alone."""

import io
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.preprocessing import (
    INTERPOLATION_MODES,
    decode,
    decode_picture,
    preprocess,
    rendered,
)
from shared.data.sample import BadSampleError
from shared.data.views import crop_corner, resized_size, view_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # on damaged metadata, after which it decodes on


def photograph(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    """Smooth, as pictures are, with some noise."""
    generator = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height), 3)
    noisy = np.asarray(coarse, np.int16) + generator.integers(-9, 10, (height, width, 3))
    return PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def saved(image: PIL.Image.Image, format_: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def orientation(value: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


RGB = photograph(53, 37)
FILES = {
    **{f"JPEG {name}": saved(RGB, "JPEG", subsampling=name) for name in ("4:4:4", "4:2:2", "4:2:0")},
    "JPEG 4:1:1": saved(RGB, "JPEG", subsampling="4:1:1"),
    "JPEG grey": saved(RGB.convert("L"), "JPEG"),
    "JPEG progressive": saved(RGB, "JPEG", progressive=True),
    "JPEG CMYK": saved(RGB.convert("CMYK"), "JPEG"),
    "JPEG on its side": saved(RGB, "JPEG", exif=orientation(6)),
    **{f"PNG {mode}": saved(RGB.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    "PNG of 16 bits": saved(PIL.Image.fromarray(np.asarray(RGB.convert("L"), np.uint16) * 257), "PNG"),
    "PNG on its side": saved(RGB, "PNG", exif=orientation(8)),
    "PNG grey on its side": saved(RGB.convert("L"), "PNG", exif=orientation(5)),
    "PNG with a transparent colour": saved(RGB, "PNG", transparency=(1, 2, 3)),
    **{format_: saved(RGB, format_) for format_ in ("WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")},
    "TIFF on its side": saved(RGB, "TIFF", exif=orientation(6)),
    "WEBP on its side": saved(RGB, "WEBP", exif=orientation(7)),
}


def by_pillow(content: bytes, resolution: int, mode: str) -> np.ndarray:
    decoded = decode(content)
    size = resized_size(*decoded.size, resolution, resolution)
    left, top = crop_corner(*size, resolution, resolution)
    resized = decoded.resize(size, INTERPOLATION_MODES[mode])
    return np.asarray(resized.crop((left, top, left + resolution, top + resolution)), np.int16)


@pytest.mark.parametrize("resolution", [16, 37, 64])  # smaller, as it is, larger
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(name: str, resolution: int) -> None:
    expected = by_pillow(FILES[name], resolution, "bilinear")
    assert np.abs(preprocess(FILES[name], resolution, "bilinear") - expected).max() <= 1
    assert decode_picture(FILES[name]).size == decode(FILES[name]).size


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_in_grey(name: str) -> None:
    """Pillow's own conversion, before anything is resized."""
    decoded = decode(FILES[name], channels=1)
    np.testing.assert_array_equal(decode_picture(FILES[name], channels=1).pixels[..., 0], np.asarray(decoded))
    expected = decoded.resize(resized_size(*decoded.size, 16, 16), PIL.Image.Resampling.BILINEAR)
    left, top = crop_corner(*expected.size, 16, 16)
    expected = np.asarray(expected.crop((left, top, left + 16, top + 16)), np.int16)
    pixels = preprocess(FILES[name], 16, "bilinear", channels=1)
    assert pixels.shape == (16, 16, 1)
    assert np.abs(pixels[..., 0] - expected).max() <= 1


@pytest.mark.parametrize("mode", [*INTERPOLATION_MODES])
@pytest.mark.parametrize("name", ["JPEG 4:2:0", "JPEG grey", "PNG L", "PNG RGB"])
def test_every_filter(name: str, mode: str) -> None:
    expected = by_pillow(FILES[name], 24, mode)
    difference = np.abs(preprocess(FILES[name], 24, mode) - expected).max()
    assert difference <= (1 if mode == "bilinear" else 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 96), st.sampled_from(["JPEG", "PNG"]), st.booleans())
def test_any_size(width: int, height: int, resolution: int, format_: str, grey: bool) -> None:
    picture = photograph(width, height, seed=width)
    content = saved(picture.convert("L") if grey else picture, format_)
    expected = by_pillow(content, resolution, "bilinear")
    assert np.abs(preprocess(content, resolution, "bilinear") - expected).max() <= 1


@pytest.mark.parametrize("name", ["JPEG 4:2:0", "JPEG grey", "PNG L", "PNG RGB", "PNG P", "GIF"])
def test_a_row_of_a_batch_is_written_and_nothing_beside_it(name: str) -> None:
    for resolution in (16, 37):
        batch = np.full((3, resolution, resolution, 3), 7, np.uint8)
        picture = decode_picture(FILES[name])
        view = view_of(picture.size, (resolution, resolution))
        assert rendered(picture, view, "bilinear", out=batch[1]).base is batch
        np.testing.assert_array_equal(batch[1], preprocess(FILES[name], resolution, "bilinear"))
        assert (batch[[0, 2]] == 7).all()


def damaged(content: bytes) -> Iterator[bytes]:
    """Cut anywhere, and with bytes anywhere changed: one bit, one byte, several, some left out."""
    generator = np.random.default_rng(len(content))
    yield from (content[:length] for length in range(0, len(content), max(1, len(content) // 60)))
    for kind in range(120):
        changed, where = bytearray(content), int(generator.integers(len(content)))
        if kind % 4 == 0:
            changed[where] ^= 1 << int(generator.integers(8))
        elif kind % 4 == 1:
            changed[where] = int(generator.integers(256))
        elif kind % 4 == 2:
            changed[where : where + 8] = generator.bytes(8)
        else:
            del changed[where : where + int(generator.integers(1, 20))]
        yield bytes(changed)


@pytest.mark.parametrize("name", ["JPEG 4:2:0", "JPEG grey", "JPEG progressive", "PNG L", "PNG RGB", "PNG RGBA"])
def test_a_damaged_file_is_what_it_is_to_pillow(name: str) -> None:
    refused = 0
    for content in damaged(FILES[name]):
        try:
            expected = np.asarray(decode(content))
        except BadSampleError as error:
            refused += 1
            with pytest.raises(BadSampleError) as other:
                decode_picture(content)
            assert str(other.value) == str(error)  # noqa: PT017
        else:
            pixels = decode_picture(content).pixels
            np.testing.assert_array_equal(np.broadcast_to(pixels, expected.shape), expected)
    assert refused > 20
