"""How fast a run was. The first logged entry is left out: it holds the compilation.

Axes: N logged entries.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.compare.run import Run
from shared.compare.series import Floats, values_of


@dataclass(frozen=True)
class Speed:
    """The speed at every logged entry but the first: float64 [N] each; times in seconds per optimizer step."""

    steps_N: npt.NDArray[np.int64]
    images_per_second_N: Floats
    step_time_N: Floats
    data_wait_N: Floats

    @property
    def data_wait_share_N(self) -> Floats:
        """Of the step time, 0 to 1."""
        with np.errstate(all="ignore"):
            return self.data_wait_N / self.step_time_N


def measure_speed(run: Run) -> Speed:
    """From the metrics of a run."""
    entries = run.training_entries[1:]
    images_per_second_N = values_of(entries, "images_per_second")
    with np.errstate(all="ignore"):
        step_time_N = run.global_batch_size / images_per_second_N
    return Speed(
        values_of(entries, "step").astype(np.int64),
        images_per_second_N,
        step_time_N,
        values_of(entries, "data_wait"),
    )


def percentile(values: Floats, percent: float) -> float | None:
    """Of the finite values; None if there are none."""
    finite = values[np.isfinite(values)]
    with np.errstate(all="ignore"):
        return float(np.percentile(finite, percent)) if finite.size else None
