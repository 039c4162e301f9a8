"""The short form of `python3 -m tests.hostile`: some cases of every kind, of which none may end badly."""

from collections import Counter

from tests.hostile import report
from tests.hostile.campaign import Campaign, run
from tests.hostile.kinds import KINDS, SIDES, kind_of, numbers_of
from tests.hostile.outcome import Outcome

SEED = 1
# Reading a model takes as long as reading ten shards.
QUICK, SLOW = 128, 32


def test_hostile_inputs_are_handled_or_harmless() -> None:
    by_side = {side: [name for name, kind in KINDS.items() if kind.side == side] for side in SIDES}
    slow = by_side["flax"] + by_side["torch"]
    numbers = [*numbers_of(by_side["shared"], QUICK), *numbers_of(slow, SLOW)]
    results = run(Campaign(SEED, numbers))
    assert not report.failures(results), "\n".join(["python3 -m tests.hostile", *report.failures(results)])
    assert Counter(result.kind for result in results) == Counter(kind_of(number).name for number in numbers)
    outcomes = Counter(result.outcome for result in results)
    assert min(outcomes[Outcome.HANDLED], outcomes[Outcome.HARMLESS]) > len(results) / 5, "they are not what they were"
