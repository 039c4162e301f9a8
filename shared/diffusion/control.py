"""How strongly ControlNets steer a picture while it is drawn, as diffusers' pipelines have it.

N ControlNets, S inference steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Strength:
    """What one ControlNet adds to the UNet, and when.

    Attributes:
        conditioning_scale: multiplies every residual.
        start, end: between which parts of all steps there is any control, from 0 to 1.
        graded: residuals of early blocks, which hold details, count less, from a tenth on.
    """

    conditioning_scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    graded: bool = False

    def scales(self, steps: int) -> np.ndarray:
        """float32 [S]: what multiplies the residuals at each step."""
        number = np.arange(steps)
        is_on = (number / steps >= self.start) & ((number + 1) / steps <= self.end)
        return np.where(is_on, self.conditioning_scale, 0.0).astype(np.float32)


@dataclass(frozen=True)
class Control:
    """What all ControlNets of a picture add, whose residuals are summed.

    Attributes:
        strengths: of each.
        only_conditional: classifier-free guidance compares with what is drawn without prompt *and* without control.
    """

    strengths: tuple[Strength, ...] = (Strength(),)
    only_conditional: bool = False

    @classmethod
    def of(cls, strengths: Sequence[Strength], *, guess_mode: bool, pools_globally: Sequence[bool]) -> "Control":
        """With the pipelines' `guess_mode`, which a first ControlNet with `global_pool_conditions` always turns on;
        one that has that is not graded itself."""
        is_guessing = guess_mode or pools_globally[0]
        each = zip(strengths, pools_globally, strict=True)
        graded = tuple(replace(strength, graded=is_guessing and not pools) for strength, pools in each)
        return cls(graded, only_conditional=is_guessing)

    def scales(self, steps: int) -> np.ndarray:
        """float32 [S,N]: what multiplies the residuals of each at each step."""
        return np.stack([strength.scales(steps) for strength in self.strengths], axis=-1)


FULL_CONTROL = Control()


def grades(residuals: int) -> list[float]:
    """What multiplies each of a graded ControlNet's residuals, from the first down block's to the mid block's."""
    factors: list[float] = np.logspace(-1, 0, residuals).tolist()
    return factors
