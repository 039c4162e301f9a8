"""A figure of the training steps in both runs.

Axes: N logged steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from shared.compare.run import Entry, Run

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A figure at the steps that both runs logged: float64 [N] each, NaN where a run has none."""

    steps_N: npt.NDArray[np.int64]
    a_N: Floats
    b_N: Floats

    @property
    def relative_difference_N(self) -> Floats:
        """float64 [N], see `relative_difference`."""
        return relative_difference(self.a_N, self.b_N)


def relative_difference(a: Floats, b: Floats) -> Floats:
    """|a - b| / max(|a|, |b|) element by element: 0 where both are 0, infinite where one is not finite."""
    with np.errstate(all="ignore"):
        difference = np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))
    difference = np.where(a == b, 0.0, difference)
    return np.where(np.isfinite(a) & np.isfinite(b), difference, np.inf)


def common_series(a: Run, b: Run, name: str) -> Series:
    """The figure `name` at the steps that both runs logged.

    An entry is a mean over the steps since the entry before it, so only entries over the same steps are compared.
    """
    by_window_a, by_window_b = _by_window(a), _by_window(b)
    windows = sorted(by_window_a.keys() & by_window_b.keys(), key=lambda window: window[1])
    return Series(
        np.array([last for _, last in windows], np.int64),
        values_of([by_window_a[window] for window in windows], name),
        values_of([by_window_b[window] for window in windows], name),
    )


def values_of(entries: Sequence[Entry], name: str) -> Floats:
    """The figure of every entry, NaN where it has none."""
    values = (entry.get(name) for entry in entries)
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _by_window(run: Run) -> dict[tuple[int, int], Entry]:
    """Entries by the last step of the entry before and their own.

    The first entry of a run that continues another folder's has none before it: it is known to cover one step where
    every step is logged, and else taken to cover all up to its own, which matches no other run's.
    """
    steps = [int(entry["step"] or 0) for entry in run.training_entries]
    begin = [steps[0] - 1 if run.config.logging_steps == 1 else 0] if steps else []
    return dict(zip(pairwise([*begin, *steps]), run.training_entries, strict=True))
