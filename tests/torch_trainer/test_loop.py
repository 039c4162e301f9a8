"""The loop's order of things, with everything around it replaced."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from shared.evaluation.validation import ModelsInTraining
from shared.run.interruption import Interruption
from shared.run.log import NonFiniteError
from shared.run.setup import Due
from shared.user_errors import UserError
from torch_trainer.loop import Loop
from torch_trainer.training.step import StepResult


@dataclass
class Around:
    """What the loop uses, and in `events` what it did, in order."""

    last: int = 4
    processes: int = 1
    losses: dict[int, float] = field(default_factory=dict)
    stop_requested_in_another_at: int | None = None
    data_ends_before: int | None = None
    save_at: int | None = None
    traced_at: int | None = None
    events: list[str] = field(default_factory=list)

    # The loop's parts, which are all this object.
    first = 0
    record: Any = None

    @property
    def num_processes(self) -> int:
        return self.processes

    loss_scale = None

    def learning_rate(self, step: int) -> float:
        return 1e-3

    def due(self, step: int, *, interrupted: bool) -> Due:
        last = step == self.last
        return Due(save=step == self.save_at or interrupted, validate=last, stop=last or interrupted)

    def size_of(self, step: int) -> tuple[int, int]:
        return 64, 64

    def iterate(self, first: int) -> Iterator[tuple[int, Any]]:
        for step in range(first, self.last):
            if step + 1 == self.data_ends_before:
                raise UserError("no more data")
            yield step, {}

    def __call__(self, batch: Any, learning_rate: float, *, stop_requested: bool) -> StepResult:
        step = sum(event.startswith("dispatch") for event in self.events) + 1
        self.events.append(f"dispatch {step}")
        asked = stop_requested or self.stop_requested_in_another_at == step
        return _Result(step, self.events, self.losses.get(step, 0.5), asked)

    def add(self, figures: Any, evaluation: Any = None, *, before_break: bool = False) -> None:
        self.events.append(f"log {figures.step}")

    def restart_clock(self) -> None:
        pass

    def before_step(self, step: int) -> None:
        pass

    def after_step(self, step: int) -> bool:
        return step == self.traced_at

    def before_validation(self, step: int) -> None:
        pass

    def after_validation(self, step: int) -> None:
        pass

    def save(self, step: int, record: Any) -> None:
        self.events.append(f"save {step}")

    def measure(self, models: Any, step: int) -> None:
        self.events.append(f"measure {step}")

    def draw(self, models: Any, step: int) -> None:
        self.events.append(f"draw {step}")

    def loop(self) -> Loop:
        me: Any = self
        return Loop(
            steps=me,
            accelerator=me,
            train_step=me,
            loader=me,
            checkpoints=me,
            validation=me,
            models=ModelsInTraining(me, me),
            log=me,
            profiler=me,
        )


class _Result(StepResult):
    def __init__(self, step: int, events: list[str], loss: float, asked: bool):
        super().__init__(*(torch.tensor(float(value)) for value in (loss, 1.0, asked)))
        self._read: Callable[[], None] = lambda: events.append(f"read {step}")

    def read(self) -> tuple[float, float, bool]:
        self._read()
        return super().read()


def test_a_step_is_read_when_the_next_is_on_its_way() -> None:
    around = Around(last=3)
    assert around.loop().run(Interruption()) == 3
    assert around.events == [
        "dispatch 1",
        *("dispatch 2", "read 1", "log 1"),
        *("dispatch 3", "read 2", "log 2"),
        *("read 3", "measure 3", "log 3", "draw 3"),
    ]


def test_a_step_is_read_before_what_it_left_is_saved() -> None:
    around = Around(last=3, save_at=1)
    around.loop().run(Interruption())
    assert around.events[:4] == ["dispatch 1", "read 1", "log 1", "save 1"]


def test_a_step_is_read_before_the_time_that_writing_a_trace_takes_counts_for_the_next() -> None:
    around = Around(last=3, traced_at=2)
    around.loop().run(Interruption())
    assert around.events[1:6] == ["dispatch 2", "read 1", "log 1", "read 2", "log 2"]


def test_a_figure_that_is_not_finite_saves_the_step_before_it() -> None:
    """Not the one that is already on its way: the device let it change nothing."""
    around = Around(losses={3: math.nan})
    with pytest.raises(NonFiniteError, match="at step 3"):
        around.loop().run(Interruption())
    assert around.events[-3:] == ["dispatch 4", "read 3", "save 2"]


def test_after_a_first_step_that_is_not_finite_there_is_nothing_to_save() -> None:
    around = Around(losses={1: math.inf})
    with pytest.raises(NonFiniteError, match="at step 1"):
        around.loop().run(Interruption())
    assert not any(event.startswith("save") for event in around.events)


def test_data_that_ends_in_an_error_leaves_the_last_step_in_the_log_and_saved() -> None:
    around = Around(data_ends_before=3)
    with pytest.raises(UserError, match="no more data"):
        around.loop().run(Interruption())
    assert around.events[-3:] == ["read 2", "log 2", "save 2"]


@pytest.mark.parametrize("asked_here", [True, False])
def test_several_processes_stop_after_the_same_step(asked_here: bool) -> None:
    """Whichever of them was asked: what decides came with the figures of the step before."""
    around = Around(processes=2, stop_requested_in_another_at=None if asked_here else 1)
    interruption = Interruption()
    if asked_here:
        interruption.requested = 15
    assert around.loop().run(interruption) == 2
    assert around.events == ["dispatch 1", "dispatch 2", "read 1", "log 1", "read 2", "log 2", "save 2"]
