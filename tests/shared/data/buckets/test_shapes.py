"""Which shapes there are, and that every picture gets the nearest one that is kept."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.buckets.shapes import choose_buckets, nearest, possible_sizes

# Podell et al. 2023, appendix I: height and width of those up to twice as long as wide.
SDXL = {
    *((704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152), (896, 1088)),
    *((960, 1088), (960, 1024), (1024, 1024)),
}

SIDES = st.integers(1, 100_000)
PICTURES = st.lists(
    st.tuples(SIDES, SIDES) | st.sampled_from([(0, 0), (3, 2), (2, 3), (1, 1)]), min_size=1, max_size=60
)
RESOLUTIONS = st.integers(1, 1024).map(lambda eighths: 8 * eighths)


def log_distance(picture: tuple[int, int], size: tuple[int, int]) -> float:
    return abs(math.log(picture[0] / picture[1]) - math.log(size[0] / size[1]))


def test_those_of_1024_are_among_what_sdxl_was_trained_in() -> None:
    assert {(min(size), max(size)) for size in possible_sizes(1024)} <= SDXL
    assert len(possible_sizes(1024)) == 9


@given(RESOLUTIONS)
def test_no_shape_has_more_pixels_than_the_square_or_sides_that_a_vae_cannot_take(resolution: int) -> None:
    sizes = possible_sizes(resolution)
    assert (resolution, resolution) in sizes
    assert sizes == [(height, width) for width, height in reversed(sizes)]
    assert sizes == sorted(set(sizes), key=lambda size: size[0] / size[1])
    for width, height in sizes:
        assert width % 8 == height % 8 == 0
        assert max(width, height) <= 2 * min(width, height)
        assert 0.8 * resolution**2 < width * height <= resolution**2
        if resolution >= 512:
            assert width == height or width % 64 == height % 64 == 0


@given(st.tuples(SIDES, SIDES), RESOLUTIONS)
def test_the_nearest_is_that_of_a_search_through_all(picture: tuple[int, int], resolution: int) -> None:
    sizes = possible_sizes(resolution)
    (chosen,) = nearest(np.array([picture[0] / picture[1]]), sizes)
    distances = [log_distance(picture, size) for size in sizes]
    assert distances[chosen] == pytest.approx(min(distances), abs=1e-12)


@settings(max_examples=200)
@given(PICTURES, RESOLUTIONS, st.integers(1, 9), st.integers(1, 12))
def test_every_picture_is_in_one_bucket_and_in_the_nearest(
    pictures: list[tuple[int, int]], resolution: int, most: int, least: int
) -> None:
    buckets = choose_buckets(np.array(pictures, np.int32), resolution, most, least)
    assert 1 <= len(buckets) <= most
    assert sorted(np.concatenate([bucket.members_K for bucket in buckets])) == list(range(len(pictures)))
    known = [sum(pictures[member] != (0, 0) for member in bucket.members_K) for bucket in buckets]
    assert len(buckets) == 1 or min(known) >= least
    for bucket, count in zip(buckets, known, strict=True):
        for member in bucket.members_K:
            if pictures[member] == (0, 0):
                assert count == max(known)
            else:
                least_distance = min(log_distance(pictures[member], other.size) for other in buckets)
                assert log_distance(pictures[member], bucket.size) == pytest.approx(least_distance, abs=1e-12)


def test_what_is_given_up_is_what_the_pictures_can_best_do_without() -> None:
    """Few pictures that would lose much count for more than many that would lose nothing."""
    pictures = [(448, 576)] * 30 + [(512, 512)] * 20 + [(640, 384)] * 15 + [(576, 448)] * 1
    sizes = np.array(pictures, np.int32)
    assert [(bucket.size, len(bucket.members_K)) for bucket in choose_buckets(sizes, 512, 9, 8)] == [
        ((448, 576), 30),
        ((512, 512), 21),
        ((640, 384), 15),
    ]
    assert [bucket.size for bucket in choose_buckets(sizes, 512, 2, 8)] == [(448, 576), (640, 384)]
