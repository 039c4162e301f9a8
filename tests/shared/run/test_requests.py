"""When a checkpoint is asked for, and what follows a step."""

import time
from typing import Any

import pytest

from shared.data.batches import BatchSpec
from shared.run.requests import NO_REQUESTS, Requests, SavingClock
from shared.run.setup import Due, Steps


def test_a_clock_asks_once_for_each_interval_since_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock, asked = SavingClock(30), []
    for second in range(120):
        now = 1000.0 + second
        if clock.asks():
            asked.append(second)
        if second in (10, 42):  # because of a number of steps, and as it was asked for a little later
            clock.restart()
    assert asked == [40, 72]


def test_without_seconds_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SavingClock(None)
    monkeypatch.setattr(time, "monotonic", lambda: 1e12)
    assert not clock.asks()


SAVE, STOP = Requests(save=True), Requests(stop=True)


@pytest.mark.parametrize(
    ("step", "asked", "due"),
    [
        (3, NO_REQUESTS, Due(save=False, is_timed=False, validate=False, stop=False)),
        (3, SAVE, Due(save=True, is_timed=True, validate=False, stop=False)),
        (4, NO_REQUESTS, Due(save=True, is_timed=False, validate=False, stop=False)),
        (4, SAVE, Due(save=True, is_timed=False, validate=False, stop=False)),
        (5, SAVE, Due(save=True, is_timed=True, validate=True, stop=False)),
        (5, STOP, Due(save=True, is_timed=False, validate=False, stop=True)),
        (6, Requests(stop=True, save=True), Due(save=True, is_timed=False, validate=False, stop=True)),
        (7, SAVE, Due(save=False, is_timed=False, validate=True, stop=True)),
    ],
)
def test_only_a_checkpoint_that_nothing_else_asks_for_is_timed(step: int, asked: Requests, due: Due) -> None:
    no_rate: Any = None
    steps = Steps(BatchSpec(1), None, 0, 7, no_rate, {}, checkpointing_steps=4, validation_steps=5)
    assert steps.due(step, asked) == due
