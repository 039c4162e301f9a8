"""Do the pictures have the condition's colours? For conditions that say only where which colour is: blur, palette.

Axes: Y X squares, H height, W width, C = 3 channels.
"""

import numpy as np
import numpy.typing as npt
import PIL.Image

from shared.evaluate.metrics.base import MeanOverConditions, Measured, Metric, Pixels
from shared.evaluation.colour_difference import ciede2000, srgb_to_lab
from shared.generate.models import NamedModels
from shared.user_errors import UserError

_SQUARES = 8  # on the shorter side: 64 px at 512 px, what a palette has


def open_colours(models: NamedModels) -> Metric:
    """Raises UserError where it is not one condition in colours."""
    if [kind.channels for kind in models.conditions] != [3]:
        channels = " and ".join(str(kind.channels) for kind in models.conditions)
        raise UserError(
            "--metrics colours compares pictures with one condition of 3 channels, and the ControlNets take conditions "
            f"of {channels}: leave it out."
        )
    return MeanOverConditions(_of_condition, "lower", {"squares": f"{_SQUARES} on the shorter side"})


def _of_condition(measured: Measured) -> dict[str, float]:
    asked = _coarse(measured.condition_HWN)
    return {
        "colour_difference": float(
            np.mean([ciede2000(_coarse(picture), asked).mean() for picture in measured.pictures_HWC])
        )
    }


def _coarse(image_HWC: Pixels) -> npt.NDArray[np.float64]:
    """L*a*b* [Y,X,3] of the mean sRGB colour of each square."""
    height, width = image_HWC.shape[:2]
    side = min(height, width) / _SQUARES
    size = max(1, round(width / side)), max(1, round(height / side))
    small = PIL.Image.fromarray(image_HWC).resize(size, PIL.Image.Resampling.BOX)
    return srgb_to_lab(np.asarray(small))
