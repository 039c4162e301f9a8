"""The fill50k task, generated: a circle's outline in, the filled circle on a coloured background out.

Reference: Zhang et al. 2023 (ControlNet), repository docs/train.md: "burly wood circle with orange background".
The task teaches fidelity (the circle must sit where its outline is) and text (both colours are named), and its ground
truth is known, so what a trained ControlNet draws can be measured.

Axes: H height, W width, C channels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import PIL.Image

from shared.data.sample import RawSample
from shared.data.sources.base import Manifest
from shared.data.sources.colour_names import READABLE_NAMES, RGB, rgb
from shared.randomness import Purpose, generator
from shared.user_errors import UserError

SMALLEST_RADIUS, LARGEST_RADIUS = 0.1, 0.35  # of the picture's size
LEAST_COLOUR_DISTANCE = 120.0  # Euclidean in 8-bit RGB, of 441 between black and white
_LEAST_SIZE = 8


@dataclass(frozen=True)
class Circle:
    """The ground truth of one picture. Lengths in pixels; the centre of the first pixel is at (0.5, 0.5)."""

    size: int
    centre_xy: tuple[float, float]
    radius: float
    colour_name: str
    background_name: str

    @property
    def colour(self) -> RGB:
        return rgb(self.colour_name)

    @property
    def background(self) -> RGB:
        return rgb(self.background_name)

    @property
    def caption(self) -> str:
        return f"{self.colour_name} circle with {self.background_name} background"


@dataclass(frozen=True)
class DrawnCircle:
    """One training pair (RGB images, `truth.size` pixels square) with its ground truth."""

    image: PIL.Image.Image
    conditioning_image: PIL.Image.Image
    truth: Circle


def draw(index: int, size: int, seed: int) -> DrawnCircle:
    """Picture `index` of the endless set that `seed` names: the same circle, in proportion, at every size.

    The whole circle lies inside the picture. Edges are antialiased by area, as in photographs, so that nothing of the
    task hangs on single pixels; the outline, white on black, is 1/128 of the size wide and at least 2 pixels, so that
    it survives the condition encoder's eightfold downsampling.

    Raises:
        UserError: for a size below 8 pixels.
    """
    if size < _LEAST_SIZE:
        raise UserError(f"circles of {size} pixels were asked for; expected at least {_LEAST_SIZE}")
    truth = _truth(index, size, seed)
    distance_HW = _distance_from(truth.centre_xy, size)
    filled_HW = np.clip(truth.radius - distance_HW + 0.5, 0.0, 1.0)
    outline_HW = np.clip(max(2.0, size / 128) / 2 - np.abs(distance_HW - truth.radius) + 0.5, 0.0, 1.0)
    return DrawnCircle(
        image=_blend(filled_HW, truth.colour, truth.background),
        conditioning_image=_blend(outline_HW, (255, 255, 255), (0, 0, 0)),
        truth=truth,
    )


class CirclesSource:
    """Random access to the first `count` generated circles."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        if count < 1:
            raise UserError(f"--generated_circles is {count}; expected at least 1")
        self._count, self._size, self._seed = count, size, seed
        self.manifest: Manifest = {
            "kind": "circles",
            "location": "generated",
            "samples": count,
            "fingerprint": f"circles-1-seed-{seed}-size-{size}",  # 1: the version of the drawing
            "columns": ["image", "conditioning_image", "text"],
        }

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> RawSample:
        if not 0 <= index < self._count:
            raise IndexError(index)
        drawn = draw(index, self._size, self._seed)
        return RawSample(drawn.image, (drawn.conditioning_image,), (drawn.truth.caption,), f"circle {index}")

    def captions(self, index: int) -> tuple[str, ...]:
        """Without drawing."""
        return (_truth(index, self._size, self._seed).caption,)

    def header(self, index: int) -> PIL.Image.Image:
        """See `header_at`: a picture of the size of all, and empty."""
        return PIL.Image.new("L", (self._size, self._size))


def _truth(index: int, size: int, seed: int) -> Circle:
    rng = generator(seed, Purpose.CIRCLES, index)
    radius = float(rng.uniform(SMALLEST_RADIUS, LARGEST_RADIUS))
    x, y = (float(rng.uniform(radius, 1 - radius)) for _ in range(2))
    colour_name, background_name = _colours(rng)
    return Circle(size, (x * size, y * size), radius * size, colour_name, background_name)


def _colours(rng: np.random.Generator) -> tuple[str, str]:
    while True:
        colour, background = (READABLE_NAMES[int(choice)] for choice in rng.integers(len(READABLE_NAMES), size=2))
        if np.linalg.norm(np.subtract(rgb(colour), rgb(background))) >= LEAST_COLOUR_DISTANCE:
            return colour, background


def _distance_from(centre_xy: tuple[float, float], size: int) -> npt.NDArray[np.float64]:
    pixel_centres = np.arange(size) + 0.5
    x_W, y_H = pixel_centres - centre_xy[0], pixel_centres - centre_xy[1]
    distance_HW: npt.NDArray[np.float64] = np.sqrt(y_H[:, None] ** 2 + x_W[None, :] ** 2)
    return distance_HW


def _blend(coverage_HW: npt.NDArray[np.float64], inside: RGB, outside: RGB) -> PIL.Image.Image:
    coverage_HW1 = coverage_HW[:, :, None]
    pixels_HWC = coverage_HW1 * np.array(inside) + (1 - coverage_HW1) * np.array(outside)
    return PIL.Image.fromarray(np.round(pixels_HWC).astype(np.uint8))
