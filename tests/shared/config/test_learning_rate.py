import dataclasses
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from hypothesis import given
from hypothesis import strategies as st

from shared.config import TrainConfig
from shared.config.learning_rate import SCHEDULES, LearningRateSchedule


def diffusers_learning_rates(schedule: LearningRateSchedule, count: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=schedule.learning_rate)
    scheduler = get_scheduler(
        schedule.name,
        optimizer,
        num_warmup_steps=schedule.warmup_steps,
        num_training_steps=schedule.total_steps,
        num_cycles=schedule.num_cycles,
        power=schedule.power,
    )
    rates = []
    for _ in range(count):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 10, 39, 41, 60])
@pytest.mark.parametrize("shape", [{}, {"num_cycles": 3, "power": 2.0}, {"num_cycles": 2, "power": 0.5}])
def test_every_step_is_that_of_diffusers(name: str, warmup_steps: int, shape: dict[str, Any]) -> None:
    schedule = LearningRateSchedule(name, 3e-4, warmup_steps, total_steps=40, **shape)
    ours = [schedule(step) for step in range(70)]
    assert ours == pytest.approx(diffusers_learning_rates(schedule, 70), rel=1e-12, abs=1e-18)


def test_a_polynomial_run_that_is_all_warmup_ends_at_its_end() -> None:
    """diffusers divides by zero here, at the step after the last."""
    schedule = LearningRateSchedule("polynomial", 1e-3, 40, total_steps=40)
    assert schedule(39) == pytest.approx(1e-3 * 39 / 40)
    assert schedule(40) == pytest.approx(1e-7)


@given(
    name=st.sampled_from(SCHEDULES),
    warmup_steps=st.integers(0, 50),
    total_steps=st.integers(1, 50),
    step=st.integers(0, 200),
    num_cycles=st.integers(1, 5),
    power=st.floats(0.1, 4),
)
def test_rates_lie_between_zero_and_the_full_rate(
    name: str, warmup_steps: int, total_steps: int, step: int, num_cycles: int, power: float
) -> None:
    schedule = LearningRateSchedule(name, 1e-5, warmup_steps, total_steps, num_cycles, power)
    assert 0 <= schedule(step) <= 1e-5 * (1 + 1e-12)


def test_the_configuration_names_everything() -> None:
    config = dataclasses.replace(
        TrainConfig(),
        lr_scheduler="cosine_with_restarts",
        learning_rate=2e-5,
        lr_warmup_steps=5,
        lr_num_cycles=4,
        lr_power=3.0,
    )
    expected = LearningRateSchedule("cosine_with_restarts", 2e-5, 5, 100, num_cycles=4, power=3.0)
    assert LearningRateSchedule.from_config(config, 100, global_batch_size=8) == expected
    scaled = LearningRateSchedule.from_config(dataclasses.replace(config, scale_lr=True), 100, global_batch_size=8)
    assert scaled == dataclasses.replace(expected, learning_rate=16e-5)


def test_a_polynomial_that_would_rise_is_refused() -> None:
    with pytest.raises(ValueError, match="1e-08"):
        LearningRateSchedule("polynomial", 1e-8, 0, 10)
