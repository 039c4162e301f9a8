"""Two runs and everything that is compared of them."""

from dataclasses import dataclass
from pathlib import Path

from shared.compare.comparability import check_comparable
from shared.compare.drift import Drift, common_checkpoints, measure_checkpoint_drift, measure_drift
from shared.compare.run import Run, open_run
from shared.compare.series import Series, common_series
from shared.compare.verdict import Verdict, check_steps_in_common, judge


@dataclass(frozen=True)
class Comparison:
    """All of it in figures.

    Attributes:
        drift: of the final ControlNets.
        checkpoint_drift: the relative L2 difference at the checkpoints that both runs have, by step.
        unreadable_checkpoints: the steps of common checkpoints that are not in diffusers' layout in both runs.
    """

    a: Run
    b: Run
    loss: Series
    grad_norm: Series
    drift: Drift
    checkpoint_drift: dict[int, float]
    unreadable_checkpoints: list[int]
    verdict: Verdict

    @property
    def labels(self) -> tuple[str, str]:
        """What to call the runs: by their backends where those differ, else by their folders."""
        if self.a.backend != self.b.backend:
            return self.a.backend, self.b.backend
        names = self.a.folder.resolve().name, self.b.folder.resolve().name
        return names if names[0] != names[1] else (f"A: {names[0]}", f"B: {names[1]}")


def compare(folder_a: Path, folder_b: Path) -> Comparison:
    """Read and compare two run folders.

    Raises:
        UserError: a run is missing, unfinished or damaged, or a comparison would mean nothing.
    """
    a, b = open_run(folder_a), open_run(folder_b)
    check_comparable(a, b)
    loss = common_series(a, b, "loss")
    check_steps_in_common(a, b, loss)
    drift = measure_drift(folder_a, folder_b)
    readable, unreadable = common_checkpoints(folder_a, folder_b)
    return Comparison(
        a=a,
        b=b,
        loss=loss,
        grad_norm=common_series(a, b, "grad_norm"),
        drift=drift,
        checkpoint_drift={step: measure_checkpoint_drift(folder_a, folder_b, step) for step in readable},
        unreadable_checkpoints=unreadable,
        verdict=judge(a, b, loss, drift),
    )
