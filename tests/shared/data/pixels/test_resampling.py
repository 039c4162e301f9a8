"""Against Pillow, whose pixels are to be met to the last bit.

Until version 12 Pillow resampled columns first. Since 13 it may begin with rows where that is less work, which moves
the last bit of some pixels. One direction at a time, all versions agree.
"""

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.pixels.resampling import resample

SIDES = st.one_of(st.integers(1, 12), st.integers(1, 150))


def noise(width: int, height: int, channels: int) -> np.ndarray:
    """Of extremes, which show a wrong weight or rounding first."""
    generator = np.random.default_rng(width * 1000 + height)
    return generator.choice(np.array([0, 1, 128, 254, 255], np.uint8), (height, width, channels))


def resized_by_pillow(pixels: np.ndarray, resized: tuple[int, int]) -> np.ndarray:
    image = PIL.Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    at_once = image.resize(resized, PIL.Image.Resampling.BILINEAR)
    narrowed = image.resize((resized[0], image.height), PIL.Image.Resampling.BILINEAR)
    result = narrowed.resize(resized, PIL.Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(at_once, np.int16) - np.asarray(result)).max() <= 1
    return np.asarray(result).reshape(resized[1], resized[0], -1)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from([1, 3]), st.booleans(), st.data())
def test_any_part_of_any_size(
    width: int, height: int, new_width: int, new_height: int, channels: int, flipped: bool, data: st.DataObject
) -> None:
    left, top = data.draw(st.integers(0, new_width - 1)), data.draw(st.integers(0, new_height - 1))
    right, bottom = data.draw(st.integers(left + 1, new_width)), data.draw(st.integers(top + 1, new_height))
    pixels = noise(width, height, channels)
    out = np.full((bottom - top, right - left, channels), 77, np.uint8)
    resample(pixels, (new_width, new_height), (left, top, right, bottom), flipped, out)
    part = resized_by_pillow(pixels, (new_width, new_height))[top:bottom, left:right]
    np.testing.assert_array_equal(out, part[:, ::-1] if flipped else part)


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((1, 1), (64, 64)),
        ((3000, 2), (5, 2)),  # a filter of twelve hundred pixels
        ((2, 3000), (2, 3)),
        ((1024, 768), (682, 512)),
        ((767, 513), (765, 512)),  # weights that hardly differ from a copy's
        ((512, 700), (513, 701)),
        ((640, 480), (1365, 1024)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_of_every_day_and_the_ends(size: tuple[int, int], resized: tuple[int, int], channels: int) -> None:
    pixels = noise(*size, channels)
    out = np.empty((resized[1], resized[0], channels), np.uint8)
    resample(pixels, resized, (0, 0, *resized), False, out)
    np.testing.assert_array_equal(out, resized_by_pillow(pixels, resized))


@pytest.mark.parametrize("flipped", [False, True])
def test_grey_is_repeated(flipped: bool) -> None:
    pixels = noise(40, 30, 1)
    grey, rgb = np.empty((12, 12, 1), np.uint8), np.empty((12, 12, 3), np.uint8)
    for out in (grey, rgb):
        resample(pixels, (16, 12), (2, 0, 14, 12), flipped, out)
    np.testing.assert_array_equal(rgb, np.repeat(grey, 3, axis=2))


def test_what_is_only_read_may_be_read_only() -> None:
    pixels = noise(9, 9, 3)
    pixels.flags.writeable = False
    out = np.empty((4, 4, 3), np.uint8)
    resample(pixels, (4, 4), (0, 0, 4, 4), False, out)
    np.testing.assert_array_equal(out, resized_by_pillow(pixels, (4, 4)))
