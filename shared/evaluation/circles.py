"""Conditioning fidelity on the circles task: is the disc where the outline is, in the colours that the caption names?

The disc is found in the picture again without being told where it is or what colour it has, so a model that ignores
its condition scores like a random circle (`chance_levels`), and place and colour are measured apart.
Reference for the task: Zhang et al. 2023 (ControlNet), docs/train.md; for measuring a condition by extracting it from
the generated picture again: Li et al. 2024 (ControlNet++).

Axes: H height, W width, C = 3 channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.data.sources.circles import Circle, draw
from shared.evaluation.colour_difference import ciede2000, srgb_to_lab
from shared.user_errors import UserError

LEAST_CONTRAST = 40.0
"""RGB distance of disc and background below which there is no disc: a third of the least distance in the task."""

LARGEST_COLOUR_DIFFERENCE = 10.0
"""CIEDE2000 difference up to which a produced colour counts as the named one.

Side by side people tell colours apart from about 2 on, but a name asks for less. Up to 10 apart, near-synonyms count
for each other (navy and dark blue 1.6, tan and burly wood 3.1, red and orange red 6.4) and others do not (gold and
golden rod 13.7, red and crimson 13.8): 3.2% of all pairs of the 148 names are so close, and a picture must have two
colours right.
"""

_BORDER = 1  # pixels
_MOST_ROUNDS = 20


@dataclass(frozen=True)
class Segmentation:
    """A picture as two colours: `disc_HW` bool, True where the disc is; colours float64 [3], 0 to 255."""

    disc_HW: npt.NDArray[np.bool_]
    disc_colour: npt.NDArray[np.float64]
    background_colour: npt.NDArray[np.float64]


@dataclass(frozen=True)
class CircleFidelity:
    """One picture against its ground truth.

    Attributes:
        iou: intersection over union of the drawn and the produced disc (Jaccard index), 0 to 1.
        disc_color_error, background_color_error: Euclidean RGB distance of the produced to the named colour, 0 to 441.
        color_correct: there is a disc, and both colours are within `LARGEST_COLOUR_DIFFERENCE` of the named ones.
    """

    iou: float
    disc_color_error: float
    background_color_error: float
    color_correct: bool


def segment(image_HWC: npt.NDArray[np.uint8]) -> Segmentation:
    """Split a picture into background, the colour most of its border has, and disc: everything nearer another colour.

    Two-medians in RGB. Medians, unlike means, do not move with antialiased edges, so a clean drawing is cut exactly
    where half of a pixel is covered. Where the colours end up closer than `LEAST_CONTRAST`, nothing is disc, and both
    colours are that of the whole picture.

    Raises:
        UserError: the image is not uint8 [H, W, 3].
    """
    _check(image_HWC)
    pixels_HWC = image_HWC.astype(np.float64)
    background = _median(_border(pixels_HWC))
    distance_HW = np.linalg.norm(pixels_HWC - background, axis=-1)
    disc = background
    disc_HW = distance_HW > distance_HW.max() / 2
    for _ in range(_MOST_ROUNDS):
        if not disc_HW.any() or disc_HW.all():
            return _one_colour(pixels_HWC)
        disc, background = _median(pixels_HWC[disc_HW]), _median(pixels_HWC[~disc_HW])
        previous_HW, disc_HW = disc_HW, _nearer(pixels_HWC, disc, background)
        if (disc_HW == previous_HW).all():
            break
    if np.linalg.norm(disc - background) < LEAST_CONTRAST:
        return _one_colour(pixels_HWC)
    return Segmentation(disc_HW, disc, background)


def disc_mask(truth: Circle) -> npt.NDArray[np.bool_]:
    """bool [H,W]: the pixels whose centre lies in the drawn disc, those that it covers at least by half."""
    centres = np.arange(truth.size) + 0.5
    x, y = truth.centre_xy
    return np.hypot(centres[:, None] - y, centres[None, :] - x) <= truth.radius


def measure(image_HWC: npt.NDArray[np.uint8], truth: Circle) -> CircleFidelity:
    """Compare a generated picture with the circle that its condition outlines and its caption describes.

    Raises:
        UserError: the image is not uint8 [size, size, 3].
    """
    found = segment(image_HWC)
    if found.disc_HW.shape != (truth.size, truth.size):
        raise UserError(
            f"The picture has shape {image_HWC.shape}; expected {(truth.size, truth.size, 3)}, its condition's size. "
            "Generate it at that size."
        )
    drawn_HW = disc_mask(truth)
    union = np.count_nonzero(found.disc_HW | drawn_HW)
    produced, named = (found.disc_colour, found.background_colour), (truth.colour, truth.background)
    differences = ciede2000(srgb_to_lab(produced), srgb_to_lab(named))
    return CircleFidelity(
        iou=np.count_nonzero(found.disc_HW & drawn_HW) / union,
        disc_color_error=float(np.linalg.norm(found.disc_colour - truth.colour)),
        background_color_error=float(np.linalg.norm(found.background_colour - truth.background)),
        color_correct=bool(found.disc_HW.any() and differences.max() <= LARGEST_COLOUR_DIFFERENCE),
    )


def summarise(measured: Sequence[CircleFidelity]) -> dict[str, float]:
    """Means over pictures: `circle_iou`, `color_error` (of disc and background together), `color_accuracy` (a share).

    Raises:
        UserError: no pictures.
    """
    if not measured:
        raise UserError("No pictures were measured; give at least one generated picture with its circle.")
    return {
        "circle_iou": float(np.mean([picture.iou for picture in measured])),
        "color_error": float(
            np.mean([(picture.disc_color_error + picture.background_color_error) / 2 for picture in measured])
        ),
        "color_accuracy": float(np.mean([picture.color_correct for picture in measured])),
    }


def chance_levels(size: int, count: int, seed: int) -> dict[str, float]:
    """What pictures of unrelated circles of the task score: perfect drawings that know neither outline nor caption.

    The figures of `summarise` for `count` such pairs. Over 3,000 pairs at 64 pixels: `circle_iou` 0.19, `color_error`
    195, `color_accuracy` 0.001.
    """
    pairs = ((draw(2 * index, size, seed), draw(2 * index + 1, size, seed)) for index in range(count))
    return summarise([measure(np.asarray(produced.image), asked.truth) for produced, asked in pairs])


def _one_colour(pixels_HWC: npt.NDArray[np.float64]) -> Segmentation:
    colour = _median(pixels_HWC.reshape(-1, 3))
    return Segmentation(np.zeros(pixels_HWC.shape[:2], np.bool_), colour, colour)


def _nearer(
    pixels_HWC: npt.NDArray[np.float64], disc: npt.NDArray[np.float64], background: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    to_disc_HW, to_background_HW = (np.square(pixels_HWC - colour).sum(axis=-1) for colour in (disc, background))
    return to_disc_HW < to_background_HW


def _border(pixels_HWC: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    inner = np.zeros(pixels_HWC.shape[:2], np.bool_)
    inner[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    return pixels_HWC[~inner]


def _median(pixels_NC: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.median(pixels_NC, axis=0)


def _check(image_HWC: npt.NDArray[np.uint8]) -> None:
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        raise UserError(f"The picture is {image_HWC.dtype} {image_HWC.shape}; expected uint8 [H, W, 3].")
