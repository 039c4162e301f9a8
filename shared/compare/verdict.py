"""Do two runs agree? The tolerances are those that the project promises for its two backends in float32."""

from dataclasses import dataclass

import numpy as np

from shared.compare.drift import Drift
from shared.compare.run import Run
from shared.compare.series import Series
from shared.untrusted import shown
from shared.user_errors import UserError

LOSS_TOLERANCE = 1e-3
"""Relative, for the loss of every logged step."""

CONTROLNET_TOLERANCE = 1e-3
"""Relative L2 norm, for all parameters of the final ControlNet together."""


@dataclass(frozen=True)
class Verdict:
    """The worst figures.

    Attributes:
        steps_compared: logged steps.
        loss: the largest relative difference of the loss, at `loss_step`.
        first_step_apart: the first step with a loss beyond the tolerance, None if there is none.
        controlnet: the relative L2 difference of the final ControlNets.
        reduced_precision: what else than float32 the runs computed in, one phrase; None for float32.
    """

    steps_compared: int
    loss: float
    loss_step: int
    first_step_apart: int | None
    controlnet: float
    reduced_precision: str | None

    @property
    def losses_agree(self) -> bool:
        return self.loss <= LOSS_TOLERANCE

    @property
    def controlnets_agree(self) -> bool:
        return self.controlnet <= CONTROLNET_TOLERANCE

    @property
    def agree(self) -> bool:
        return self.losses_agree and self.controlnets_agree


def check_steps_in_common(a: Run, b: Run, loss: Series) -> None:
    """Raises UserError where the runs have no logged step in common."""
    if loss.steps_N.size == 0:
        raise UserError(
            f"{shown(a.folder)} and {shown(b.folder)} have no logged step in common (--logging_steps "
            f"{a.config.logging_steps} and {b.config.logging_steps}). Train one of them again with the --logging_steps "
            "of the other."
        )


def judge(a: Run, b: Run, loss: Series, drift: Drift) -> Verdict:
    """Compare the worst figures with the tolerances; `loss` has at least one step."""
    difference_N = loss.relative_difference_N
    worst = int(np.argmax(difference_N))
    apart_N = loss.steps_N[difference_N > LOSS_TOLERANCE]
    return Verdict(
        steps_compared=loss.steps_N.size,
        loss=float(difference_N[worst]),
        loss_step=int(loss.steps_N[worst]),
        first_step_apart=int(apart_N[0]) if apart_N.size else None,
        controlnet=drift.relative,
        reduced_precision=_reduced_precision(a, b),
    )


def _reduced_precision(a: Run, b: Run) -> str | None:
    used = {run.mixed_precision for run in (a, b)} - {"no"}
    used |= {"TF32" for run in (a, b) if run.config.allow_tf32}
    return " and ".join(sorted(used)) if used else None
