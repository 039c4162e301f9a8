import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.evaluation.convergence import convergence_step

levels = st.floats(0, 1)


def jump(before: int, after: int, low: float = 0.2, high: float = 0.9) -> list[tuple[int, float]]:
    """`before` evaluations at the low level, then `after` at the high one, every 100 steps from 0."""
    return [(100 * index, low if index < before else high) for index in range(before + after)]


@given(st.integers(1, 20), st.integers(2, 20))
def test_the_step_of_a_jump_is_found(before: int, after: int) -> None:
    assert convergence_step(jump(before, after)) == 100 * before


@given(st.integers(1, 10), st.integers(2, 10), st.data())
def test_noise_of_less_than_half_the_jump_does_not_move_it(before: int, after: int, data: st.DataObject) -> None:
    noisy = [(step, value + data.draw(st.floats(-0.15, 0.15))) for step, value in jump(before, after)]
    assert convergence_step(noisy) == 100 * before


@given(st.integers(3, 10), st.integers(3, 10), st.data())
def test_one_outlier_moves_it_by_one_evaluation_at_most(before: int, after: int, data: st.DataObject) -> None:
    series = jump(before, after)
    where = data.draw(st.integers(1, before + after - 1))
    series[where] = (series[where][0], data.draw(levels))
    assert convergence_step(series) in (100 * (before - 1), 100 * before, 100 * (before + 1))


@given(st.lists(levels, max_size=12), st.floats(0.5, 10), st.floats(-5, 5))
def test_units_do_not_matter(values: list[float], scale: float, offset: float) -> None:
    rounded = [round(value * 64) / 64 for value in values]  # so that scaling cannot make or break ties
    scale, offset = round(scale * 4) / 4, round(offset * 4) / 4
    series = list(enumerate(rounded))
    scaled = [(step, value * scale + offset) for step, value in series]
    assert convergence_step(scaled, 0.25 * scale) == convergence_step(series, 0.25)


@given(st.lists(levels, min_size=1, max_size=12))
def test_what_is_found_is_an_evaluation_after_the_first_and_the_end_is_clearly_better(values: list[float]) -> None:
    found = convergence_step(list(enumerate(values)), least_gain=0.2)
    if found is not None:
        assert 0 < found < len(values)
        assert sorted(values[-3:])[1] - values[0] >= 0.2
    elif len(values) >= 3:
        assert sorted(values[-3:])[1] - values[0] < 0.2


@given(st.lists(levels, min_size=4, max_size=12), levels)
def test_what_comes_after_a_model_that_stays_converged_does_not_move_the_step(
    values: list[float], untrained: float
) -> None:
    series = [(0, untrained / 4), *((index + 1, untrained / 4 + 0.5) for index in range(len(values)))]
    assert convergence_step(series) == convergence_step(series[:-1]) == 1


def test_a_gradual_rise_is_dated_at_its_middle() -> None:
    assert convergence_step([(step, step / 100) for step in range(101)]) == 50


def test_a_model_that_does_not_improve_has_not_converged() -> None:
    assert convergence_step([(step, 0.3) for step in range(10)]) is None
    assert convergence_step([(step, 0.9 - step / 20) for step in range(10)]) is None
    assert convergence_step([(step, 0.3 + step / 100) for step in range(10)]) is None


def test_a_model_that_collapses_again_has_not_converged() -> None:
    assert convergence_step([*jump(3, 4), (700, 0.2), (800, 0.2), (900, 0.2)]) is None


def test_the_last_of_several_rises_counts() -> None:
    series = [*jump(2, 3), *((step + 500, value) for step, value in jump(3, 3))]
    assert convergence_step(series) == 800


def test_one_good_evaluation_is_not_enough() -> None:
    assert convergence_step(jump(5, 1)) is None
    assert convergence_step(jump(1, 1)) is None
    assert convergence_step([]) is None


@pytest.mark.parametrize(
    ("series", "least_gain", "message"),
    [
        ([(0, 0.1), (0, 0.2)], 0.2, "Step 0 follows step 0"),
        ([(5, 0.1), (3, 0.2)], 0.2, "Step 3 follows step 5"),
        ([(0, 0.1), (1, math.nan)], 0.2, "fidelity at step 1 is nan"),
        ([(0, 0.1)], 0.0, "least_gain is 0"),
    ],
)
def test_what_is_no_series_is_refused(series: list[tuple[int, float]], least_gain: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convergence_step(series, least_gain)
