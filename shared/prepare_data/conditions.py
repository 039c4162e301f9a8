"""Conditions that are made of an image by arithmetic alone.

ControlNet 1.1 (github.com/lllyasviel/ControlNet-v1-1-nightly) names them, and what its models were trained on: "Canny
with random thresholds", tiles that are enlarged again, random masks. It gives no numbers; those here are ours.

Axes: H height, W width, C = 3 channels, RGB.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageFilter

from shared.prepare_data.options import ComputedCondition
from shared.user_errors import UserError

Pixels = npt.NDArray[np.uint8]

_LOW_THRESHOLD = 50, 150  # of the Sobel gradient's L1 norm on 8-bit pixels
_HIGH_BY_LOW = 2.0, 3.0  # Canny 1986, "A computational approach to edge detection", section VI
_BLUR = 1 / 128, 1 / 32  # standard deviation as a part of the shorter side
_PALETTE_SQUARE = 64  # pixels: Mou et al. 2023, "T2I-Adapter", section 3.3
_TILE_FACTOR = 2.0, 8.0
_HOLES = 1, 4
_HOLE_SIDE = 0.1, 0.5  # as a part of the image's

_RESIZE = PIL.Image.Resampling


class Draws(Protocol):
    """What is random about a condition: a `np.random.Generator`, or `TypicalDraws`."""

    def uniform(self, low: float, high: float, /) -> float:
        """Between two numbers."""
        ...

    def integers(self, low: int, high: int | None = None, /, *, endpoint: bool) -> Any:
        """From `low` to `high`, or from 0 to `low`."""
        ...


class TypicalDraws:
    """The middle of what is drawn in training."""

    def uniform(self, low: float, high: float, /) -> float:
        """As `Draws`."""
        return (low + high) / 2

    def integers(self, low: int, high: int | None = None, /, *, endpoint: bool) -> int:
        """As `Draws`."""
        first, last = (0, low) if high is None else (low, high)
        return (first + last - (not endpoint)) // 2


def make_condition(name: ComputedCondition, image_HWC: Pixels, rng: Draws) -> Pixels:
    """A condition of an image.

    Args:
        name: which.
        image_HWC: uint8.
        rng: decides what is random about it.

    Returns:
        uint8, as high and wide as the image: [H,W] for canny (0 and 255) and grey, else [H,W,C].

    Raises:
        UserError: canny, and OpenCV is not installed.
    """
    return _CONDITIONS[name](image_HWC, rng)


def check_available(name: ComputedCondition) -> None:
    """Raises UserError where what makes a condition is not installed."""
    make_condition(name, np.zeros((8, 8, 3), np.uint8), np.random.default_rng(0))


def _canny(image_HWC: Pixels, rng: Draws) -> Pixels:
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "--condition canny is made with OpenCV, which is not installed. Run: pip install opencv-python-headless"
        ) from error
    low = rng.uniform(*_LOW_THRESHOLD)
    high = low * rng.uniform(*_HIGH_BY_LOW)
    return np.asarray(cv2.Canny(np.ascontiguousarray(image_HWC), low, high), np.uint8)


def _grey(image_HWC: Pixels, rng: Draws) -> Pixels:
    return np.asarray(PIL.Image.fromarray(image_HWC).convert("L"))  # ITU-R 601-2 luma


def _blur(image_HWC: Pixels, rng: Draws) -> Pixels:
    radius = rng.uniform(*_BLUR) * min(image_HWC.shape[:2])
    return np.asarray(PIL.Image.fromarray(image_HWC).filter(PIL.ImageFilter.GaussianBlur(radius)))


def _palette(image_HWC: Pixels, rng: Draws) -> Pixels:
    return _small_and_back(image_HWC, _PALETTE_SQUARE, _RESIZE.NEAREST)


def _tile(image_HWC: Pixels, rng: Draws) -> Pixels:
    return _small_and_back(image_HWC, rng.uniform(*_TILE_FACTOR), _RESIZE.BICUBIC)


def _inpaint(image_HWC: Pixels, rng: Draws) -> Pixels:
    masked_HWC = image_HWC.copy()
    for _ in range(rng.integers(*_HOLES, endpoint=True)):
        (top, bottom), (left, right) = (_hole(side, rng) for side in image_HWC.shape[:2])
        masked_HWC[top:bottom, left:right] = 0
    return masked_HWC


def _hole(side: int, rng: Draws) -> tuple[int, int]:
    """Beginning and end, in pixels, of a part of a side."""
    length = max(1, round(side * rng.uniform(*_HOLE_SIDE)))
    begin = int(rng.integers(side - length, endpoint=True))
    return begin, begin + length


def _small_and_back(image_HWC: Pixels, factor: float, enlarging: PIL.Image.Resampling) -> Pixels:
    picture = PIL.Image.fromarray(image_HWC)
    small = (max(1, round(picture.width / factor)), max(1, round(picture.height / factor)))
    return np.asarray(picture.resize(small, _RESIZE.BOX).resize(picture.size, enlarging))


_CONDITIONS: dict[ComputedCondition, Callable[[Pixels, Draws], Pixels]] = {
    "canny": _canny,
    "grey": _grey,
    "blur": _blur,
    "palette": _palette,
    "tile": _tile,
    "inpaint": _inpaint,
}
