"""The loop's order of things, with everything around it replaced."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from shared.data.joint_batches import JointBatches
from shared.evaluation.validation import ModelsInTraining
from shared.run.interruption import Interruption
from shared.run.log import NonFiniteError
from shared.run.requests import NO_REQUESTS, Requests, SavingClock
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
    asked_by_another: dict[int, Requests] = field(default_factory=dict)
    asked_here: list[int] = field(default_factory=list)
    data_ends_before: int | None = None
    data_of_another_end_before: int | None = None
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
    keeps_what_was_good = True

    def learning_rate(self, step: int) -> float:
        return 1e-3

    def is_saved(self, step: int) -> bool:
        return step == self.save_at

    def due(self, step: int, asked: Requests) -> Due:
        last, save = step == self.last, step == self.save_at or asked.stop or asked.save
        return Due(save, asked.save, validate=last, stop=last or asked.stop)

    def size_of(self, step: int) -> tuple[int, int]:
        return 64, 64

    sizes = ((64, 64),)

    def blank(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        return {"noise": np.zeros(1, np.float32)}

    def iterate(self, first: int) -> Iterator[tuple[int, Any]]:
        for step in range(first, self.last):
            if step + 1 == self.data_ends_before:
                raise UserError("no more data")
            yield step, self.blank((64, 64))

    def __call__(self, batch: Any, learning_rate: float, requests: Requests) -> StepResult:
        step = sum(event.startswith("dispatch") for event in self.events) + 1
        self.events.append(f"dispatch {step}")
        others = self.asked_by_another.get(step, NO_REQUESTS)
        asked = Requests(requests.stop or others.stop, requests.save or others.save)
        loss = self.losses.get(step, 0.5) + float(batch["noise"].sum())
        if step == self.data_of_another_end_before:
            loss = math.nan
        return _Result(step, self.events, loss, asked)

    def reduce(self, flag: torch.Tensor, reduction: str) -> torch.Tensor:
        return flag + (self.data_of_another_end_before is not None)

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

    def save(self, step: int, record: Any, *, timed: bool = False) -> None:
        self.events.append(f"save {step}{' timed' * timed}")

    def wait(self) -> None:
        pass

    def measure(self, models: Any, step: int) -> None:
        self.events.append(f"measure {step}")

    def draw(self, models: Any, step: int) -> None:
        self.events.append(f"draw {step}")

    device = torch.device("cpu")

    def loop(self) -> Loop:
        me: Any = self
        return Loop(
            steps=me,
            accelerator=me,
            train_step=me,
            batches=JointBatches(me, self.first, is_one_of_several=self.processes > 1),
            checkpoints=me,
            clock=_Clock(self),
            validation=me,
            models=ModelsInTraining(me, me),
            log=me,
            profiler=me,
        )


class _Clock(SavingClock):
    """Asks before the steps that it is told."""

    def __init__(self, around: Around):
        super().__init__(None)
        self._around = around

    def asks(self) -> bool:
        dispatched = sum(event.startswith("dispatch") for event in self._around.events)
        return dispatched + (self._around.processes > 1) in self._around.asked_here


class _Result(StepResult):
    def __init__(self, step: int, events: list[str], loss: float, asked: Requests):
        super().__init__(torch.tensor(loss), torch.tensor(1.0), torch.tensor([float(flag) for flag in asked]))
        self._read: Callable[[], None] = lambda: events.append(f"read {step}")

    def read(self) -> tuple[float, float, Requests]:
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
    around = Around(processes=2, asked_by_another={} if asked_here else {1: Requests(stop=True)})
    interruption = Interruption()
    if asked_here:
        interruption.requested = 15
    assert around.loop().run(interruption) == 2
    assert around.events == ["dispatch 1", "dispatch 2", "read 1", "log 1", "read 2", "log 2", "save 2"]


def test_a_request_that_comes_with_a_validation_is_heard_after_it() -> None:
    """Its step is read then, and not with the next one."""
    around = Around(processes=2, asked_here=[2], save_at=2)
    around.loop().run(Interruption())
    assert [event for event in around.events if event.startswith("save")] == ["save 2"], "a save was due anyway"
    around = Around(processes=2, traced_at=2, asked_by_another={2: Requests(save=True)})
    around.loop().run(Interruption())
    assert [event for event in around.events if event.startswith("save")] == ["save 3 timed"]


@pytest.mark.parametrize(("processes", "saved"), [(1, "save 2 timed"), (2, "save 3 timed")])
def test_a_clock_asks_for_a_checkpoint_of_its_own(processes: int, saved: str) -> None:
    around = Around(processes=processes, asked_here=[2])
    assert around.loop().run(Interruption()) == 4
    assert [event for event in around.events if event.startswith("save")] == [saved]


@pytest.mark.parametrize("here", [True, False])
def test_data_that_fail_in_one_of_several_processes_end_them_all_with_the_step_before(here: bool) -> None:
    around = Around(processes=2, data_ends_before=3 if here else None, data_of_another_end_before=None if here else 3)
    with pytest.raises(UserError, match="no more data" if here else "Another process of this run met data .* step 3"):
        around.loop().run(Interruption())
    assert around.events[-4:] == ["log 2", "dispatch 4", "read 3", "save 2"]


def test_a_figure_that_is_not_finite_is_told_as_such_where_data_fail_after_it() -> None:
    around = Around(processes=2, losses={2: math.nan}, data_ends_before=3)
    with pytest.raises(NonFiniteError, match="at step 2"):
        around.loop().run(Interruption())


def test_what_is_not_good_any_more_is_not_saved() -> None:
    """Under DeepSpeed, which takes the step in most precisions."""
    around = Around(processes=2, data_of_another_end_before=3)
    around.keeps_what_was_good = False
    with pytest.raises(UserError, match="What was trained since the newest checkpoint is lost"):
        around.loop().run(Interruption())
    assert not any(event.startswith("save") for event in around.events)
