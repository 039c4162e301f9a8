"""Which part of a picture is trained on, told from sizes."""

from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared.data.pixels import Picture
from shared.data.preprocessing import rendered
from shared.data.views import Placement, are_of_one_shape, view_of

SHARES = st.floats(0, 1, exclude_max=True)
SIZES = st.tuples(st.integers(8, 60), st.integers(8, 60))


@settings(max_examples=200, deadline=None)
@given(
    size=SIZES, wanted=SIZES, corner=st.none() | st.tuples(SHARES, SHARES), flipped=st.booleans(), seed=st.integers(0)
)
def test_a_view_shows_what_pil_cuts_out_of_the_mirrored_picture(
    size: tuple[int, int], wanted: tuple[int, int], corner: tuple[float, float] | None, flipped: bool, seed: int
) -> None:
    """diffusers' train_text_to_image_sdxl.py: resize, flip, crop; the corner is told as it is cropped."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = PIL.Image.fromarray(pixels)
    view = view_of(size, wanted, Placement(corner, flipped))
    resized = picture.resize(view.resized, PIL.Image.Resampling.BILINEAR)
    assert 0 <= view.left <= resized.width - wanted[0]
    assert 0 <= view.top <= resized.height - wanted[1]
    turned = PIL.ImageOps.mirror(resized) if flipped else resized
    expected = turned.crop((view.left, view.top, view.left + wanted[0], view.top + wanted[1]))
    shown = rendered(Picture(picture), view, "bilinear").astype(int)
    assert np.abs(shown - np.asarray(expected)).max() <= 1


def test_every_corner_is_as_likely_as_another() -> None:
    """Of a resized picture with four columns to spare there are five crops, as torchvision's RandomCrop has them."""
    shares = np.random.default_rng(0).random((5000, 2))
    lefts = [view_of((36, 32), (32, 32), Placement((float(x), float(y)))).left for x, y in shares]
    counts = np.bincount(lefts, minlength=5)
    assert len(counts) == 5
    assert np.abs(counts - 1000).max() < 150


@pytest.mark.parametrize(
    ("one", "other", "is_one_shape"),
    [
        ((512, 512), (512, 512), True),
        ((4000, 3000), (1024, 768), True),
        ((1023, 767), (512, 384), True),  # halved and rounded
        ((1000, 667), (150, 100), True),
        ((1000, 667), (64, 42), True),  # a thumbnail: 42.7 truncated
        ((512, 512), (512, 511), True),
        ((1023, 767), (704, 512), False),  # rounded to multiples of 64, as annotators do
        ((1024, 768), (768, 1024), False),  # turned
        ((1024, 768), (768, 768), False),
        ((512, 512), (512, 480), False),
        ((1, 60_000), (60_000, 1), False),
    ],
)
def test_shapes(one: tuple[int, int], other: tuple[int, int], is_one_shape: bool) -> None:
    assert are_of_one_shape(one, other, 512) == is_one_shape
    assert are_of_one_shape(other, one, 512) == is_one_shape


@settings(max_examples=300, deadline=None)
@given(
    shorter=st.integers(64, 2000),
    ratio=st.floats(1, 2),  # beyond, a pixel of the shorter side is several of the longer one
    is_tall=st.booleans(),
    factor=st.floats(0.2, 5),
    rounded=st.sampled_from([int, round, lambda length: int(length) + 1]),
    resolution=st.sampled_from([64, 512, 1024]),
)
def test_what_was_resized_and_rounded_is_of_one_shape(
    shorter: int, ratio: float, is_tall: bool, factor: float, rounded: Callable[[float], int], resolution: int
) -> None:
    longer = int(shorter * ratio)
    size = (shorter, longer) if is_tall else (longer, shorter)
    width, height = (rounded(side * factor) for side in size)
    assert are_of_one_shape(size, (width, height), resolution)


@settings(max_examples=300, deadline=None)
@given(
    one=st.tuples(st.integers(64, 2000), st.integers(64, 2000)),
    factor=st.floats(1, 3),
    more=st.tuples(st.integers(-8, 8), st.integers(-8, 8)),
)
def test_pictures_of_one_shape_end_within_a_pixel_of_each_other_and_others_do_not(
    one: tuple[int, int], factor: float, more: tuple[int, int]
) -> None:
    """Where neither is coarser than what is trained on: laid over each other by their shorter sides and centred."""
    other = (round(one[0] * factor) + more[0], round(one[1] * factor) + more[1])
    assume(min(other) >= 64)
    covering = np.array([np.array(size) * 64 / min(size) for size in (one, other)])
    apart = np.abs(covering[0] - covering[1]).max() / 2
    assume(abs(apart - 1) > 1e-6)
    assert are_of_one_shape(one, other, 64) == (apart < 1)
