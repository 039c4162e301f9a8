"""What a batch holds of an image: its pixels, or what the VAE made of them before.

Axes: R resolution, H W C of the latents.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.data.cached_latents import CachedImage
from shared.data.preprocessing import preprocess_with_sizes
from shared.data.sample import EncodedImage
from shared.data.sources.base import Source, latents_of
from shared.models.xl import Sizes

ArrayShapes = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


class BatchImage(NamedTuple):
    """`pixel_values` uint8 [R,R,3], 0 to 255, or `latent_mean` and `latent_std` [H,W,C]; and the sizes of the image."""

    arrays: dict[str, npt.NDArray[Any]]
    sizes: Sizes


def batch_image(image: EncodedImage | CachedImage, resolution: int, interpolation: str) -> BatchImage:
    """Decoded and preprocessed, or unpacked.

    Raises:
        BadSampleError: it cannot be used.
    """
    if isinstance(image, CachedImage):
        mean_HWC, std_HWC, sizes = image.unpack()
        return BatchImage({"latent_mean": mean_HWC, "latent_std": std_HWC}, sizes)
    pixels, sizes = preprocess_with_sizes(image, resolution, interpolation)
    return BatchImage({"pixel_values": pixels}, sizes)


def shapes_of_images(source: Source, resolution: int) -> ArrayShapes:
    """Of the arrays that `batch_image` makes of a source's images."""
    layout = latents_of(source)
    if layout is None:
        return {"pixel_values": ((resolution, resolution, 3), np.dtype(np.uint8))}
    return {"latent_mean": (layout.shape, layout.dtype), "latent_std": (layout.shape, layout.dtype)}
