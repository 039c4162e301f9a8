"""How strongly a ControlNet steers a picture while it is drawn, as diffusers' pipelines have it. S inference steps."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Control:
    """What a ControlNet adds to the UNet, and when.

    Attributes:
        conditioning_scale: multiplies every residual.
        start, end: between which parts of all steps there is any control, from 0 to 1.
        only_conditional: classifier-free guidance compares with what is drawn without prompt *and* without control.
        graded: residuals of early blocks, which hold details, count less, from a tenth on.
    """

    conditioning_scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    only_conditional: bool = False
    graded: bool = False

    @classmethod
    def of(
        cls, conditioning_scale: float, start: float, end: float, *, guess_mode: bool, pools_globally: bool
    ) -> "Control":
        """With the pipelines' `guess_mode`, which a ControlNet with `global_pool_conditions` has half of always."""
        return cls(
            conditioning_scale,
            start,
            end,
            only_conditional=guess_mode or pools_globally,
            graded=guess_mode and not pools_globally,
        )

    def scales(self, steps: int) -> np.ndarray:
        """float32 [S]: what multiplies the residuals at each step."""
        number = np.arange(steps)
        is_on = (number / steps >= self.start) & ((number + 1) / steps <= self.end)
        return np.where(is_on, self.conditioning_scale, 0.0).astype(np.float32)


FULL_CONTROL = Control()


def grades(residuals: int) -> list[float]:
    """What multiplies each of a graded ControlNet's residuals, from the first down block's to the mid block's."""
    factors: list[float] = np.logspace(-1, 0, residuals).tolist()
    return factors
