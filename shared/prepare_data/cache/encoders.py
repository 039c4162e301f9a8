"""What a backend supplies to make a cache: its VAE and text encoders, on its devices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt

from shared.config import TrainConfig
from shared.precomputed_text.precomputing import TextEncoder

EncodedImages = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""Mean and standard deviation [B,H,W,C] of latents, in the run's precision; uint16 for the bits of bfloat16."""


class ImageEncoder(NamedTuple):
    """A VAE's encoder: `encode` takes uint8 [B,R,R,3] of `rows` images, always as many."""

    rows: int
    encode: Callable[[npt.NDArray[Any]], EncodedImages]


@dataclass(frozen=True)
class Encoders:
    """What one backend makes of images and captions. Models are loaded when they are opened.

    Attributes:
        config: the configuration, its `mixed_precision` said.
        latent_shape: (H, W, C) of the latents of an image.
    """

    config: TrainConfig
    latent_shape: tuple[int, int, int]
    open_image_encoder: Callable[[], ImageEncoder]
    open_text_encoder: Callable[[], TextEncoder]
