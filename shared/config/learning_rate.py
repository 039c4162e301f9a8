"""Learning rate schedules, step for step those of `diffusers.optimization.get_scheduler`."""

import math
from dataclasses import dataclass
from typing import Annotated, TypedDict, get_args

from msgspec import Meta

from shared.config import TrainConfig
from shared.config.options import ScheduleName
from shared.user_errors import UserError

SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
_POLYNOMIAL_END = 1e-7
_MOST_LOOKED_AT = 1000  # steps of a curve, which is smooth

_AtLeastZero = Annotated[float, Meta(ge=0)]
_Count = Annotated[int, Meta(ge=0, le=2**53)]  # which a float holds exactly


class Course(TypedDict):
    """What decides the learning rate of every step, by flag, as checkpoints keep it.

    `max_train_steps` is how many steps the run has, whichever flag says so.
    """

    max_train_steps: _Count
    learning_rate: _AtLeastZero
    scale_lr: bool
    lr_scheduler: ScheduleName
    lr_warmup_steps: _Count
    lr_num_cycles: _Count
    lr_power: _AtLeastZero


def course_of(config: TrainConfig, total_steps: int) -> Course:
    """The course that a configuration asks for."""
    return Course(
        max_train_steps=total_steps,
        learning_rate=config.learning_rate,
        scale_lr=config.scale_lr,
        lr_scheduler=config.lr_scheduler,
        lr_warmup_steps=config.lr_warmup_steps,
        lr_num_cycles=config.lr_num_cycles,
        lr_power=config.lr_power,
    )


@dataclass(frozen=True)
class LearningRateSchedule:
    """The learning rate of each optimizer step: `schedule(step)`, where the first step is 0.

    Attributes:
        name: one of `SCHEDULES`.
        learning_rate: the rate that the schedule scales.
        warmup_steps: optimizer steps over which the rate rises from 0 (`constant` has no warm-up).
        total_steps: optimizer steps of the whole run.
        num_cycles: how often `cosine_with_restarts` runs from the full rate to 0.
        power: exponent of `polynomial`.

    Raises:
        UserError: a polynomial schedule from a rate no greater than its end, 1e-7.
    """

    name: ScheduleName
    learning_rate: float
    warmup_steps: int
    total_steps: int
    num_cycles: int = 1
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.name == "polynomial" and not self.learning_rate > _POLYNOMIAL_END:
            raise UserError(
                f"--learning_rate is {self.learning_rate}; --lr_scheduler polynomial ends at {_POLYNOMIAL_END} and has "
                "to start above that. Give a greater learning rate or another schedule."
            )

    @classmethod
    def from_config(cls, config: TrainConfig, total_steps: int, global_batch_size: int) -> "LearningRateSchedule":
        """The schedule that a configuration asks for; `--scale_lr` multiplies its rate by the global batch size."""
        return cls.of_course(course_of(config, total_steps), global_batch_size)

    @classmethod
    def of_course(cls, course: Course, global_batch_size: int) -> "LearningRateSchedule":
        """The schedule of a run that takes this course."""
        return cls(
            name=course["lr_scheduler"],
            learning_rate=course["learning_rate"] * (global_batch_size if course["scale_lr"] else 1),
            warmup_steps=course["lr_warmup_steps"],
            total_steps=course["max_train_steps"],
            num_cycles=course["lr_num_cycles"],
            power=course["lr_power"],
        )

    def __call__(self, step: int) -> float:
        """The learning rate that optimizer step `step` ≥ 0 uses."""
        return self.learning_rate * self._multiplier(step)

    def _multiplier(self, step: int) -> float:
        if self.name == "constant":
            return 1.0
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.name == "constant_with_warmup":
            return 1.0
        decay_steps = self.total_steps - self.warmup_steps
        if self.name == "polynomial":
            return self._polynomial(step, decay_steps)

        # With a warm-up as long as the run there is nothing to decay over; diffusers counts one step.
        progress = (step - self.warmup_steps) / max(1, decay_steps)
        if self.name == "linear":
            return max(0.0, (self.total_steps - step) / max(1, decay_steps))
        if self.name == "cosine":
            return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        if progress >= 1:
            return 0.0
        return max(0.0, 0.5 * (1 + math.cos(math.pi * (self.num_cycles * progress % 1.0))))

    def _polynomial(self, step: int, decay_steps: int) -> float:
        end = _POLYNOMIAL_END / self.learning_rate
        if step >= self.total_steps:
            return end
        remaining = 1 - (step - self.warmup_steps) / decay_steps
        return (1 - end) * remaining**self.power + end


def change_of_course(before: Course, now: Course, first_step: int, global_batch_size: int) -> str | None:
    """What to tell of a run that goes on with another course than it had; None where the rest of it stays the same."""
    was, is_ = (LearningRateSchedule.of_course(course, global_batch_size) for course in (before, now))
    left = range(first_step, now["max_train_steps"])
    looked_at = (*left[:: max(1, len(left) // _MOST_LOOKED_AT)], *left[-1:])
    step = next((step for step in looked_at if not math.isclose(was(step), is_(step), rel_tol=1e-6)), None)
    if step is None:
        return None
    given_before, given_now = dict(before), dict(now)
    flags = "; ".join(
        f"--{name} was {given_before[name]} and is {value}"
        for name, value in given_now.items()
        if value != given_before[name]
    )
    return (
        f"from here on the learning rate follows another curve than before: {flags}. After step {step} it would have "
        f"been {was(step):.6g} and is {is_(step):.6g}. Give the former values to stay on the curve."
    )
