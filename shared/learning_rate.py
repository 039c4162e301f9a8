"""Learning rate schedules, step for step those of `diffusers.optimization.get_scheduler`."""

import math
from dataclasses import dataclass

from shared.config import TrainConfig

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
_POLYNOMIAL_END = 1e-7


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
        ValueError: unknown name, or a polynomial schedule from a rate no greater than its end, 1e-7.
    """

    name: str
    learning_rate: float
    warmup_steps: int
    total_steps: int
    num_cycles: int = 1
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"--lr_scheduler is {self.name!r}; expected one of {', '.join(SCHEDULES)}.")
        if self.name == "polynomial" and not self.learning_rate > _POLYNOMIAL_END:
            raise ValueError(
                f"--learning_rate is {self.learning_rate}; --lr_scheduler polynomial ends at {_POLYNOMIAL_END} and has "
                "to start above that. Give a greater learning rate or another schedule."
            )

    @classmethod
    def from_config(cls, config: TrainConfig, total_steps: int, global_batch_size: int) -> "LearningRateSchedule":
        """The schedule that a configuration asks for; `--scale_lr` multiplies its rate by the global batch size."""
        return cls(
            name=config.lr_scheduler,
            learning_rate=config.learning_rate * (global_batch_size if config.scale_lr else 1),
            warmup_steps=config.lr_warmup_steps,
            total_steps=total_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
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
