"""Samples → pixels: an image and its conditions, cut from the same place.

Axes: Y X height and width that are trained on (those of a bucket, or --resolution), N channels of the conditions side
by side, H W C of latents.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.config import TrainConfig
from shared.data.cached_latents import CachedImage
from shared.data.conditions import numbered_conditions
from shared.data.pixels import Picture
from shared.data.preprocessing import decode_picture, rendered
from shared.data.sample import BadSampleError, EncodedImage, MismatchedPairError, RawSample
from shared.data.sources.base import Source, latents_of
from shared.data.views import CENTRED, Placement, Size, View, are_of_one_shape, view_of
from shared.models.xl import Sizes
from shared.untrusted import shown

logger = logging.getLogger(__name__)

_NAMED = 5  # in the log; the others are counted
_MOST_COUNTED = 100_000  # their names are held


ArrayShapes = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Of arrays by their names in a batch."""


class DecodedPair(NamedTuple):
    """What is trained on, by its names in a batch, and the sizes of what was cut.

    `pixel_values` [Y,X,3], RGB, and `conditioning_pixel_values` [Y,X,N], uint8, 0 to 255; for an image that a VAE has
    encoded `latent_mean` and `latent_std` [H,W,C] (see `Latents`) in place of the first.

    The sizes condition Stable Diffusion XL (Podell et al. 2023, section 2.2): the original, upright and before it is
    resized, and the crop's corner in the resized image, as in diffusers' `train_text_to_image_sdxl.py`.
    """

    arrays: dict[str, npt.NDArray[Any]]
    sizes: Sizes

    @property
    def pixels(self) -> npt.NDArray[np.uint8] | None:
        """Of the image; None where it came encoded."""
        return self.arrays.get("pixel_values")

    @property
    def conditioning_pixels(self) -> npt.NDArray[np.uint8]:
        return self.arrays["conditioning_pixel_values"]


class PairDecoder:
    """Decodes, resizes and crops pairs, and knows how many are of two shapes. Safe to use from several threads."""

    def __init__(self, config: TrainConfig) -> None:
        """
        Args:
            config: read for resolution, image_interpolation_mode, conditioning_interpolation, channels_of_conditions
                and mismatched_pairs.
        """
        self._config = config
        self._mismatched: set[str] = set()
        self._lock = threading.Lock()

    @property
    def mismatched(self) -> int:
        """Distinct pairs of two shapes so far, counted up to a hundred thousand."""
        return len(self._mismatched)

    def __call__(
        self,
        sample: RawSample,
        placement: Placement = CENTRED,
        rows: Mapping[str, npt.NDArray[Any]] | None = None,
        size: Size | None = None,
    ) -> DecodedPair:
        """Decode a sample, and cut all of its pictures at a place.

        Args:
            sample: what is decoded.
            placement: where it is cut.
            rows: of a batch, by the names of `DecodedPair.arrays`, to write to and to return; new arrays without.
            size: (width, height) of what is cut, where it is not the square of --resolution.

        Raises:
            BadSampleError: a part is missing, cannot be read, or is too large to be honest; or image and a condition
                are of different shapes, and such pairs are to be skipped.
        """
        sample.check()
        assert sample.image is not None
        config, rows = self._config, rows or {}
        if isinstance(sample.image, CachedImage):
            assert placement == CENTRED, "what is cached was cut when it was encoded"
            return _unpacked(sample.image, sample.conditions, config, rows)
        image, conditions = decode_picture(sample.image), _decoded(sample.conditions, config)
        width, height = size or (config.resolution, config.resolution)
        view = view_of(image.size, (width, height), placement)
        views = [
            self._view_of_condition(sample.name, image, condition, words, view, placement)
            for words, condition in zip(numbered_conditions(len(conditions)), conditions, strict=True)
        ]
        pixels = rendered(image, view, config.image_interpolation_mode, out=rows.get("pixel_values"))
        conditioning_pixels = _side_by_side(conditions, views, config, rows.get("conditioning_pixel_values"))
        return DecodedPair(
            {"pixel_values": pixels, "conditioning_pixel_values": conditioning_pixels},
            (image.height, image.width, view.top, view.left, height, width),
        )

    def report(self) -> None:
        """Say in the log how many pairs were of two shapes, if any, and what became of them."""
        if self._mismatched:
            how = self._config.mismatched_pairs
            logger.warning(
                "%d%s pairs had an image and a condition of different shapes: --mismatched_pairs %s",
                self.mismatched,
                " or more" if self.mismatched == _MOST_COUNTED else "",
                f"{how}; resize or crop would use them" if how == "skip" else how,
            )

    def _view_of_condition(
        self, name: str, image: Picture, condition: Picture, words: str, view: View, placement: Placement
    ) -> View:
        """The image's own, over which the condition is stretched: by no pixel or one, unless it is of another shape.

        `words`: what a message calls the condition.
        """
        config = self._config
        if are_of_one_shape(image.size, condition.size, min(view.size)):
            return view
        sizes = "its image has {}x{} pixels and its {} {}x{}".format(*image.size, words, *condition.size)
        is_named = self._count(name) and config.mismatched_pairs != "skip"
        match config.mismatched_pairs:
            case "skip":
                raise MismatchedPairError(f"{sizes}, which are different shapes")
            case "resize":
                if is_named:
                    logger.warning("stretched the condition of %s: %s", shown(name), sizes)
                return view
            case "crop":
                if is_named:
                    logger.warning("cropped image and condition of %s each by itself: %s", shown(name), sizes)
                return view_of(condition.size, view.size, placement)

    def _count(self, name: str) -> bool:
        """Whether this pair is to be named: one of the first, and met for the first time."""
        with self._lock:
            if name in self._mismatched or len(self._mismatched) == _MOST_COUNTED:
                return False
            self._mismatched.add(name)
            return len(self._mismatched) <= _NAMED


def shapes_of_pairs(source: Source, config: TrainConfig, size: Size) -> ArrayShapes:
    """Of what becomes of a source's samples in a batch whose pictures have this size."""
    (width, height), bytes_, latents = size, np.dtype(np.uint8), latents_of(source)
    image: ArrayShapes = {"pixel_values": ((height, width, 3), bytes_)}
    if latents is not None:
        image = dict.fromkeys(("latent_mean", "latent_std"), (latents.shape, latents.dtype))
    return image | {"conditioning_pixel_values": ((height, width, config.control_channels), bytes_)}


def conditioning_interpolation(config: TrainConfig) -> str:
    """The filter that resizes conditions: the images' unless it has one of its own."""
    return config.conditioning_interpolation or config.image_interpolation_mode


def _decoded(conditions: Sequence[EncodedImage], config: TrainConfig) -> list[Picture]:
    channels = config.channels_of_conditions
    return [decode_picture(condition, count) for condition, count in zip(conditions, channels, strict=True)]


def _side_by_side(
    conditions: Sequence[Picture], views: Sequence[View], config: TrainConfig, out: npt.NDArray[np.uint8] | None
) -> npt.NDArray[np.uint8]:
    """What each view shows of its condition, as channels [R,R,N]; in `out`, where that is given."""
    interpolation, channels = conditioning_interpolation(config), config.channels_of_conditions
    if len(conditions) == 1:
        return rendered(conditions[0], views[0], interpolation, channels[0], out)
    parts = [
        rendered(condition, view, interpolation, count)
        for condition, view, count in zip(conditions, views, channels, strict=True)
    ]
    return np.concatenate(parts, axis=-1, out=out)


def _unpacked(
    image: CachedImage, conditions: Sequence[EncodedImage], config: TrainConfig, rows: Mapping[str, npt.NDArray[Any]]
) -> DecodedPair:
    """All were cut when the image was encoded."""
    pictures = _decoded(conditions, config)
    for picture in pictures:
        if picture.size != (config.resolution, config.resolution):
            raise BadSampleError(f"its cached condition has {picture.width}x{picture.height} pixels")
    latents = image.unpack()
    views = [view_of(picture.size, picture.size) for picture in pictures]
    pixels = _side_by_side(pictures, views, config, rows.get("conditioning_pixel_values"))
    arrays = {"latent_mean": latents.mean_HWC, "latent_std": latents.std_HWC}
    for name in rows.keys() & arrays.keys():
        rows[name][:] = arrays[name]
    return DecodedPair(arrays | {"conditioning_pixel_values": pixels}, latents.sizes)
