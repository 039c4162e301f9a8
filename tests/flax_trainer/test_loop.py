"""The loop's order of things, with everything around it replaced."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import flax_trainer.loop
from flax_trainer.loop import Loop
from shared.data.joint_batches import JointBatches
from shared.run.interruption import Interruption
from shared.run.requests import Requests, SavingClock
from shared.run.setup import Due
from shared.user_errors import UserError


class Around:
    """What the loop uses, all of it this object, and in `events` what it did, in order."""

    first, last = 0, 3
    result: Any = None
    record: Any = None
    sizes = ((64, 64),)
    step = 1
    data_end_before: int | None = None

    def __init__(self) -> None:
        self.events: list[str] = []

    def learning_rate(self, step: int) -> float:
        return 1e-3

    def is_saved(self, step: int) -> bool:
        return step == self.last

    def due(self, step: int, asked: Requests) -> Due:
        return Due(self.is_saved(step) or asked.save, asked.save, validate=False, stop=step == self.last)

    def iterate(self, first: int) -> Iterator[tuple[int, Any]]:
        for step in range(first, self.last):
            if step + 1 == self.data_end_before:
                raise UserError("no more data")
            yield step, {"noise": np.array([step + 1.0])}

    def blank(self, size: tuple[int, int]) -> Any:
        return {"noise": np.zeros(1)}

    def size_of(self, step: int) -> tuple[int, int]:
        return 64, 64

    def place_batch(self, batch: Any) -> float:
        number = float(batch["noise"][0])
        self.events.append(f"place {number:g}")
        return number

    def __call__(
        self, state: Any, frozen: Any, batch: float, learning_rate: Any, *, size: tuple[int, int]
    ) -> tuple[Any, Any]:
        self.events.append(f"dispatch {batch:g}")
        return state, {"loss": batch, "grad_norm": 1.0}

    def fetch(self, metrics: Any) -> Any:
        if isinstance(metrics, dict):
            self.events.append(f"read {metrics['loss']:g}")
        return metrics

    def to_save(self, state: Any) -> Any:
        return state

    def save(self, state: Any, record: Any, *, timed: bool = False) -> None:
        self.events.append(f"save{' timed' * timed}")

    def nothing(self, *_: Any, **__: Any) -> None:
        pass

    add = restart_clock = wait = models_in_training = before_step = after_step = nothing


def run(around: Around, *, processes: int = 1) -> list[str]:
    parts: Any = dict.fromkeys(
        ("steps", "engine", "train_step", "checkpoints", "validation", "evaluator", "log", "profiler"), around
    )
    batches = JointBatches(parts["steps"], 0, is_one_of_several=processes > 1)
    state: Any = around
    Loop(**parts, batches=batches, clock=SavingClock(None), frozen=None).run(state, Interruption())
    return around.events


def test_a_batch_goes_to_the_devices_while_the_step_before_runs() -> None:
    assert run(Around()) == [
        *("place 1", "dispatch 1"),
        *("place 2", "dispatch 2", "read 1"),
        *("place 3", "dispatch 3", "read 2"),
        *("read 3", "save"),
    ]


def test_a_single_process_saves_what_was_before_data_that_fail() -> None:
    around = Around()
    around.data_end_before = 2
    with pytest.raises(UserError, match="no more data"):
        run(around)
    assert around.events == ["place 1", "dispatch 1", "read 1", "save"]


@pytest.mark.parametrize("here", [True, False])
def test_data_that_fail_in_one_of_several_processes_end_them_all_with_the_step_before(
    here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step goes on with a loss that is no number, and the next one is on its way when that is found."""
    asked: list[bool] = []
    monkeypatch.setattr(flax_trainer.loop, "any_process", lambda mine: asked.append(mine) or True)
    around = Around()
    if here:
        around.data_end_before = 2
    else:
        monkeypatch.setattr(around, "place_batch", lambda batch: math.nan if batch["noise"][0] > 1 else 1.0)
    with pytest.raises(UserError, match="no more data" if here else "Another process of this run met data .* step 2"):
        run(around, processes=2)
    of_interest = [event for event in around.events if not event.startswith("place")]
    assert of_interest[-5:] == ["dispatch nan", "read 1", "dispatch nan", "read nan", "save"]
    assert asked == [here]
