"""What became of a fault, and of a folder."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Outcome:
    """Of one fault, or (`means` is "the end") of what a folder holds when its run is finished.

    Attributes:
        delivered: whether it happened: a run may end before.
        logged: the last step in the log when the run had ended.
        resumable: the step that the next start goes on from, as `shared.check_run` says; 0 for a fresh one.
        exit_codes: of what was started; of a signal, negative.
        failures: what should not be so, a line each.
    """

    kind: str
    folder: int
    means: str
    moment: str
    victim: str
    delivered: bool = True
    logged: int = -1
    resumable: int = 0
    exit_codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def repeated(self) -> int:
        """The steps that are taken again."""
        return max(0, self.logged - self.resumable)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def failures(outcomes: Iterable[Outcome]) -> list[str]:
    """A line each."""
    return [line(outcome) for outcome in outcomes if outcome.failures]


def line(outcome: Outcome) -> str:
    """What happened, for a terminal."""
    happened = f"{outcome.kind}, folder {outcome.folder}: {outcome.means}, {outcome.moment}"
    came = f"logged {outcome.logged}, goes on from {outcome.resumable}, exit codes {outcome.exit_codes}"
    told = [*outcome.notes, *(f"FAILED: {failure}" for failure in outcome.failures)]
    return f"{happened} ({outcome.victim}; {came}; {outcome.seconds:.0f} s)" + "".join(f"\n    {text}" for text in told)
