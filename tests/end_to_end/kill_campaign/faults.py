"""What is done to a run, drawn from a seed."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.end_to_end.kill_campaign.kinds import KINDS, Kind
from tests.end_to_end.kill_campaign.moments import Moment

MOST_STEPS_TO_A_FAULT = 3
_PER_FOLDER = 10
_LATEST = [Moment.RESULT, Moment.UPLOADING]  # a run comes there once, so whatever is to happen before, comes before


class Means(StrEnum):
    KILL = "kill -9"
    STOP = "SIGTERM"
    FULL_DISK = "full disk"
    READ_ONLY = "read-only folder"
    STOPPED_CLOCK = "stopped clock"


@dataclass(frozen=True)
class Fault:
    """One of them.

    Attributes:
        moment: of a full disk, which comes where there is no room any more, only that of the plan.
        victim: which of the processes a signal is sent to.
        steps: how many of them come first.
        delay: seconds that the moment has lasted then.
        share: of the room that a run needs for its next checkpoint, what a full disk has.
        back: seconds that a stopped clock is behind.
    """

    means: Means
    moment: Moment
    victim: str
    steps: int
    delay: float
    share: float
    back: float


@dataclass(frozen=True)
class FolderPlan:
    """All that happens to one run before it may end undisturbed."""

    kind: str
    number: int
    faults: tuple[Fault, ...]

    @property
    def has_full_disk(self) -> bool:
        return any(fault.means is Means.FULL_DISK for fault in self.faults)


def plans(seed: int, counts: Mapping[Means, int], kinds: Sequence[str]) -> list[FolderPlan]:
    """So many faults of each means, dealt out to the kinds of runs and, of each kind, to the moments."""
    draw = random.Random(seed)
    dealt: dict[str, list[Fault]] = {name: [] for name in kinds}
    for means, count in counts.items():
        names = draw.sample(list(kinds), len(kinds))
        moments = {name: draw.sample(list(Moment), len(Moment)) for name in kinds}
        for number in range(count):
            name = names[number % len(names)]
            moment = moments[name][number // len(names) % len(Moment)]
            dealt[name].append(_fault(draw, means, moment, KINDS[name]))
    found = []
    for name, faults in dealt.items():
        draw.shuffle(faults)
        folders = -(-len(faults) // _PER_FOLDER)
        found += [folder_plan(name, number, faults[number::folders]) for number in range(folders)]
    return found


def folder_plan(kind: str, number: int, faults: Sequence[Fault]) -> FolderPlan:
    """In an order in which all of them can happen."""
    return FolderPlan(kind, number, tuple(sorted(faults, key=_place)))


def steps_for(found: Sequence[FolderPlan]) -> int:
    """How many a run of the campaign has: enough that none is finished before the last of its faults."""
    most = max((len(plan.faults) for plan in found), default=0)
    return (most + 2) * (MOST_STEPS_TO_A_FAULT + 2)


def _fault(draw: random.Random, means: Means, moment: Moment, kind: Kind) -> Fault:
    if means in (Means.FULL_DISK, Means.READ_ONLY):
        moment = Moment.STEP
    return Fault(
        means,
        moment,
        victim=draw.choice(kind.members),
        steps=draw.randint(1, MOST_STEPS_TO_A_FAULT),
        delay=draw.choice([0.0, draw.uniform(0, 4.0 if moment is Moment.STARTING else 0.03)]),
        share=draw.random(),
        back=draw.uniform(0, 86_400),
    )


def _place(fault: Fault) -> int:
    return _LATEST.index(fault.moment) + 1 if fault.moment in _LATEST else 0
