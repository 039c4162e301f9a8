"""When did the model begin to follow its condition?

Reference: Zhang et al. 2023 (ControlNet), section 3.3 and the repository's docs/train.md, "sudden convergence": thanks
to the zero convolutions the model draws good pictures from the start, but ignores the condition, for thousands of steps
in their runs, until within a few steps it begins to follow it.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from shared.user_errors import UserError

LEAST_GAIN = 0.2
"""By how much a model that converged beats the untrained one: of an IoU or F1, which range from 0 to 1."""

_FEWEST = 3  # evaluations, below which one outlier cannot be told from a jump


def convergence_step(series: Sequence[tuple[int, float]], least_gain: float = LEAST_GAIN) -> int | None:
    """The first evaluated step from which on the fidelity stays above the middle between its first and its final level.

    An outlier moves it by one evaluation at most: every value is first replaced by the median of itself and its two
    neighbours, the last by that of the last three: the final level. The very first, the untrained level, stays.

    Args:
        series: (step, fidelity) in the order of the steps, the first before any training; higher is better.
        least_gain: what the final level must exceed the untrained one by, in the units of the fidelity.

    Returns:
        The step, or None where the model has not converged, or not for two evaluations yet.

    Raises:
        UserError: steps that do not increase, a fidelity that is not finite, or a least gain that is not positive.
    """
    _check(series, least_gain)
    if len(series) < _FEWEST:
        return None
    levels = _without_outliers([fidelity for _, fidelity in series])
    untrained, final = levels[0], levels[-1]
    if final - untrained < least_gain:
        return None
    middle = (untrained + final) / 2
    last_below = max(index for index, level in enumerate(levels) if level < middle)
    return series[last_below + 1][0]


def _without_outliers(values: Sequence[float]) -> list[float]:
    inner = [median(values[index - 1 : index + 2]) for index in range(1, len(values) - 1)]
    return [values[0], *inner, median(values[-3:])]


def _check(series: Sequence[tuple[int, float]], least_gain: float) -> None:
    for (step, _), (following, _) in pairwise(series):
        if following <= step:
            raise UserError(f"Step {following} follows step {step}; give the evaluations in the order of their steps.")
    for step, fidelity in series:
        if not math.isfinite(fidelity):
            raise UserError(f"The fidelity at step {step} is {fidelity}; expected a finite number.")
    if not least_gain > 0:
        raise UserError(f"least_gain is {least_gain}; expected a positive number.")
