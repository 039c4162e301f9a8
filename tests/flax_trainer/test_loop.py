"""The loop's order of things, with everything around it replaced."""

from collections.abc import Iterator
from typing import Any

from flax_trainer.loop import Loop
from shared.run.interruption import Interruption
from shared.run.setup import Due


class Around:
    """What the loop uses, all of it this object, and in `events` what it did, in order."""

    first, last = 0, 3
    result: Any = None
    record: Any = None

    def __init__(self) -> None:
        self.events: list[str] = []

    def learning_rate(self, step: int) -> float:
        return 1e-3

    def due(self, step: int, *, interrupted: bool) -> Due:
        return Due(save=step == self.last, validate=False, stop=step == self.last)

    def iterate(self, first: int) -> Iterator[tuple[int, Any]]:
        for step in range(first, self.last):
            yield step, step + 1

    def size_of(self, step: int) -> tuple[int, int]:
        return 64, 64

    def place_batch(self, batch: int) -> int:
        self.events.append(f"place {batch}")
        return batch

    def __call__(
        self, state: Any, frozen: Any, batch: int, learning_rate: Any, *, size: tuple[int, int]
    ) -> tuple[Any, Any]:
        self.events.append(f"dispatch {batch}")
        return state, {"loss": batch, "grad_norm": 1.0}

    def fetch(self, metrics: Any) -> Any:
        self.events.append(f"read {metrics['loss']}")
        return metrics

    def to_save(self, state: Any) -> Any:
        return state

    def save(self, state: Any, record: Any) -> None:
        self.events.append("save")

    def nothing(self, *_: Any, **__: Any) -> None:
        pass

    add = restart_clock = wait = models_in_training = before_step = after_step = nothing


def test_a_batch_goes_to_the_devices_while_the_step_before_runs() -> None:
    around = Around()
    parts: Any = dict.fromkeys(
        ("steps", "engine", "train_step", "loader", "checkpoints", "validation", "evaluator", "log", "profiler"), around
    )
    state: Any = around
    Loop(**parts, frozen=None).run(state, Interruption())
    assert around.events == [
        *("place 1", "dispatch 1"),
        *("place 2", "dispatch 2", "read 1"),
        *("place 3", "dispatch 3", "read 2"),
        *("read 3", "save"),
    ]
