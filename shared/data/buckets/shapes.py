"""The shapes that pictures are trained in, and which of them each picture gets.

References: NovelAI 2022, "NovelAI improvements on Stable Diffusion", aspect ratio bucketing; Podell et al. 2023 (SDXL),
section 2.3 and appendix I, whose sizes `possible_sizes(1024)` are.

Axes: N pictures, K pictures of known size, S sizes. Sizes are (width, height), in pixels; a ratio is width over height.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.data.views import Size

_MOST_ELONGATED = 2  # times as long as wide
_LARGEST_STEP, _SMALLEST_STEP = 64, 8  # of sides; at 8 pixels begin the latents, at 64 a UNet's lowest resolution


class Bucket(NamedTuple):
    """One shape: its size, and int64 [K] the pictures that are trained in it, in rising order."""

    size: Size
    members_K: npt.NDArray[np.int64]


def possible_sizes(resolution: int) -> list[Size]:
    """From the tallest to the widest: a square of that side, and what has at most as many pixels.

    Sides are multiples of 64, of less below 512. So no shape takes more memory than the square.
    """
    step = _step(resolution)
    tall = []
    for width in range(step, resolution, step):
        height = resolution**2 // width // step * step
        if width < height <= _MOST_ELONGATED * width:
            tall.append((width, height))
    return [*tall, (resolution, resolution), *((height, width) for width, height in reversed(tall))]


def choose_buckets(picture_sizes_N2: npt.NDArray[np.int32], resolution: int, most: int, least: int) -> list[Bucket]:
    """Every picture in the bucket whose ratio is nearest to its own: the larger of the two is the fewest times the
    smaller.

    Of the possible sizes those are given up first that have less than `least` pictures, then, until `most` are left,
    those without which the least more is cut off: their pictures go to the next nearest. One is kept in any case.
    Pictures of unknown size go where most are.

    Args:
        picture_sizes_N2: width and height of each picture; 0 where it is not known.
        resolution: see `possible_sizes`.
    """
    known_N = (picture_sizes_N2 > 0).all(axis=1)
    ratios_K = picture_sizes_N2[known_N, 0] / picture_sizes_N2[known_N, 1]
    sizes = possible_sizes(resolution)
    while True:
        nearest_K = nearest(ratios_K, sizes)
        counts_S = np.bincount(nearest_K, minlength=len(sizes))
        if len(sizes) == 1:
            break
        costs: list[int] = counts_S.tolist()
        if min(costs) >= least:
            if len(sizes) <= most:
                break
            costs = [_cut_off_without(index, ratios_K[nearest_K == index], sizes) for index in range(len(sizes))]
        # Of equals, the most elongated.
        del sizes[min(range(len(sizes)), key=lambda index: (costs[index], -max(sizes[index])))]
    bucket_N = np.full(len(picture_sizes_N2), counts_S.argmax(), np.intp)
    bucket_N[known_N] = nearest_K
    return [Bucket(size, np.flatnonzero(bucket_N == index)) for index, size in enumerate(sizes)]


def nearest(ratios_K: npt.NDArray[np.float64], sizes: Sequence[Size]) -> npt.NDArray[np.intp]:
    """Which of the sizes, in rising order of their ratios, is nearest to each ratio.

    Computed by divisions and products alone, which every processor rounds alike: hosts have to agree about each
    picture, and the last bit of a logarithm differs between them.
    """
    halfway = [
        (width * next_width) / (height * next_height)
        for (width, height), (next_width, next_height) in itertools.pairwise(sizes)
    ]
    return np.searchsorted(np.array(halfway), ratios_K * ratios_K)


def _cut_off_without(index: int, ratios_K: npt.NDArray[np.float64], sizes: Sequence[Size]) -> int:
    """How much more is cut off these pictures, the size's own, where there are only the other sizes: in thousandths of
    a picture, whose sum is the same on every host."""
    others = [_cut_off(ratios_K, size) for size in (*sizes[:index][-1:], *sizes[index + 1 :][:1])]
    return int((np.min(others, axis=0) - _cut_off(ratios_K, sizes[index])).sum())


def _cut_off(ratios_K: npt.NDArray[np.float64], size: Size) -> npt.NDArray[np.int64]:
    """Of pictures that are resized to cover a size, in thousandths."""
    relative_K = ratios_K / (size[0] / size[1])
    return (1000 * (1 - np.minimum(relative_K, 1 / relative_K))).astype(np.int64)


def named(size: Size) -> str:
    """As people write it: 448x576, the width first."""
    return "{}x{}".format(*size)


def _step(resolution: int) -> int:
    step = _LARGEST_STEP
    while step > _SMALLEST_STEP and 8 * step > resolution:
        step //= 2
    return step
