"""Which steps of a run are profiled."""

import logging
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.config import TrainConfig
from shared.profiling.profiled_steps import profiled_steps

CONFIG = TrainConfig()


def test_no_flag_no_steps() -> None:
    assert len(profiled_steps(CONFIG, 0, 1)) == 0


@given(st.integers(1, 50), st.integers(0, 1000), st.integers(2, 100))
def test_the_first_two_steps_are_left_out(count: int, first_step: int, more: int) -> None:
    steps = profiled_steps(replace(CONFIG, profile_steps=count), first_step, first_step + count + more)
    assert len(steps) == count
    assert steps[0] == first_step + 3  # steps count from 1
    assert steps[-1] <= first_step + count + more


@given(st.integers(1, 50), st.integers(1, 51))
def test_a_run_that_is_too_short_is_refused(count: int, last_step: int) -> None:
    if last_step < count + 2:
        with pytest.raises(ValueError, match=rf"needs a run of {count + 2} steps.*this one has {last_step}"):
            profiled_steps(replace(CONFIG, profile_steps=count), 0, last_step)


def test_a_continued_run_finishes_also_where_too_few_steps_are_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(profiled_steps(replace(CONFIG, profile_steps=5), 97, 100)) == 0
    assert "3 steps are left" in caplog.text
