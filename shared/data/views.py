"""Which part of a picture is trained on: told from its size alone, before any pixel is resized.

Axes: W width, H height. Lengths are in pixels.
"""

from dataclasses import dataclass
from typing import NamedTuple

Size = tuple[int, int]
"""Width and height, as PIL has them."""


class Placement(NamedTuple):
    """What is drawn for a sample, and holds for its image and its condition.

    Attributes:
        corner: where the crop begins, as shares of the room that it has to the right and below, 0 ≤ share < 1; None for
            the centre.
        flipped: whether the picture is mirrored, left for right.
    """

    corner: tuple[float, float] | None = None
    flipped: bool = False


CENTRED = Placement()


@dataclass(frozen=True)
class View:
    """A picture is resized to `resized`, mirrored where `flipped`, then cut to the box of `size` at (left, top)."""

    resized: Size
    left: int
    top: int
    size: Size
    flipped: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in the resized picture before it is mirrored."""
        (resized_width, _), (width, height) = self.resized, self.size
        left = resized_width - self.left - width if self.flipped else self.left
        return left, self.top, left + width, self.top + height


def view_of(picture: Size, wanted: Size, placement: Placement = CENTRED) -> View:
    """The view of a picture that is resized until it covers `wanted`, then cropped.

    A flip comes before the crop, as in diffusers' `train_text_to_image_sdxl.py`: the corner that Stable Diffusion XL is
    told is that of the picture which it sees.
    """
    resized = resized_size(*picture, *wanted)
    left, top = (
        crop_corner(*resized, *wanted)
        if placement.corner is None
        else (
            int(share * (side - wanted_side + 1))
            for share, side, wanted_side in zip(placement.corner, resized, wanted, strict=True)
        )
    )
    return View(resized, left, top, wanted, placement.flipped)


def resized_size(width: int, height: int, wanted_width: int, wanted_height: int) -> Size:
    """(width, height) after one side is as wanted and the other at least so, truncated as torchvision does."""
    if width * wanted_height <= height * wanted_width:
        return wanted_width, int(wanted_width * height / width)
    return int(wanted_height * width / height), wanted_height


def crop_corner(width: int, height: int, wanted_width: int, wanted_height: int) -> tuple[int, int]:
    """(left, top) of the centre crop of a resized image, halves rounded to even as torchvision does."""
    return round((width - wanted_width) / 2), round((height - wanted_height) / 2)


def are_of_one_shape(picture: Size, other: Size, resolution: int) -> bool:
    """Whether two pictures, laid over each other with their shorter sides alike, end within a pixel of each other.

    The pixel is that of the coarsest of the three: either picture, or what is trained on. So whatever a program rounded
    when it made one picture from the other is forgiven, and no crop shows another part of one than of the other.
    """
    side = min(resolution, *picture, *other)
    lengths = (
        (one * side / min(picture), another * side / min(other)) for one, another in zip(picture, other, strict=True)
    )
    return all(abs(one - another) <= 2 for one, another in lengths)  # one pixel at either end
