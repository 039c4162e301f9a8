"""The pictures that the demo's base model learns from: the circles of `shared.data.sources.circles`, without outlines.

Axes: N pictures, C channels, H height, W width.
"""

from dataclasses import dataclass

import numpy as np
import torch

from shared.data.sources.circles import Circle, draw

RESOLUTION = 64


@dataclass(frozen=True)
class Circles:
    """`pixels_NCHW` uint8, and the truth about each picture."""

    pixels_NCHW: torch.Tensor
    truths: list[Circle]

    def __len__(self) -> int:
        return len(self.truths)


def draw_circles(count: int, seed: int) -> Circles:
    """The first `count` circles of the endless set that `seed` names."""
    pixels_NHWC = np.empty((count, RESOLUTION, RESOLUTION, 3), np.uint8)
    truths = []
    for index in range(count):
        drawn = draw(index, RESOLUTION, seed)
        pixels_NHWC[index] = np.asarray(drawn.image)
        truths.append(drawn.truth)
    return Circles(torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).contiguous(), truths)


def normalise(pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] → float32 [-1, 1], the VAE's range."""
    return pixels_NCHW.float() / 127.5 - 1.0
