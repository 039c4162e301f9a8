"""What a case came to."""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """From the worst to the best: a case that shows several counts as the worst."""

    EXECUTED = "executed"
    LEAKED = "leaked"
    CRASHED = "crashed"
    UNBOUNDED = "unbounded"
    ENDLESS = "endless"
    TRACEBACK = "traceback"
    FORGED = "forged"
    BROKEN = "broken"
    HANDLED = "handled"
    HARMLESS = "harmless"


MEANING = {
    Outcome.HANDLED: "one sentence, exit code 2",
    Outcome.HARMLESS: "it worked, or samples were skipped and counted",
    Outcome.TRACEBACK: "a traceback, or an end that no sentence explains",
    Outcome.EXECUTED: "code of the input ran, or another program was started",
    Outcome.ENDLESS: "no end within the time that a case has",
    Outcome.UNBOUNDED: "more memory or output than a case may take",
    Outcome.LEAKED: "a file outside of the data's folder or a secret was shown or trained on",
    Outcome.FORGED: "control characters or a line of the input in what people read; markup that came alive",
    Outcome.CRASHED: "a signal ended the process",
    Outcome.BROKEN: "the case could not be built: a defect of the fuzzer",
}
GOOD = frozenset({Outcome.HANDLED, Outcome.HARMLESS})
_ORDER = list(Outcome)


@dataclass(frozen=True)
class Sign:
    """Something that a case showed, and a line about it."""

    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Result:
    """Of one case. `what` says in a few words what was hostile about it, `reason` what became of it."""

    kind: str
    seed: int
    number: int
    outcome: Outcome
    reason: str
    what: str
    seconds: float
    peak_mib: float
    signs: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return self.outcome in GOOD

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def worst(signs: list[Sign]) -> Sign:
    """The one that counts."""
    return min(signs, key=lambda sign: _ORDER.index(sign.outcome))
