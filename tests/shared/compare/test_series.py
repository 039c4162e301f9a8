"""Figures of both runs, step by step: only what is about the same steps is compared."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shared.compare.run import open_run
from shared.compare.series import common_series, relative_difference
from shared.compare.speed import measure_speed, percentile
from tests.shared.compare.run_folders import make_run

VALUES = arrays(np.float64, 8, elements=st.floats(-1e9, 1e9, allow_subnormal=False))


@given(a=VALUES, b=VALUES)
def test_the_relative_difference_is_symmetric_and_bounded(a: np.ndarray, b: np.ndarray) -> None:
    difference = relative_difference(a, b)
    np.testing.assert_array_equal(difference, relative_difference(b, a))
    assert np.all((difference >= 0) & (difference <= 2))
    np.testing.assert_array_equal(difference == 0, a == b)


@given(a=VALUES, factor=st.floats(1e-6, 1e6))
def test_the_relative_difference_knows_no_units(a: np.ndarray, factor: float) -> None:
    b = a[::-1].copy()
    np.testing.assert_allclose(relative_difference(a, b), relative_difference(a * factor, b * factor), atol=1e-12)


def test_the_relative_difference_by_hand() -> None:
    a = np.array([100.0, 100.0, 0.0, 0.0, np.nan, np.inf])
    b = np.array([99.0, 100.0, 1.0, 0.0, 1.0, np.inf])
    np.testing.assert_allclose(relative_difference(a, b), [0.01, 0, 1, 0, np.inf, np.inf], rtol=1e-12)


def with_steps(folder: Path, steps: list[int], last: int = 6, logging_steps: int = 1) -> Path:
    """A run whose entries are at these steps; each loss is its step."""
    make_run(folder, report={"steps": last}, logging_steps=logging_steps)
    entries = [{"step": step, "loss": step, "grad_norm": 1.0} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


@pytest.mark.parametrize(
    ("other", "logging_steps", "common"),
    [
        ([1, 2, 3, 4, 5, 6], 1, [1, 2, 3, 4, 5, 6]),
        ([2, 4, 6], 2, []),  # means over two steps each are not comparable with single steps
        ([1, 2, 4, 5, 6], 1, [1, 2, 5, 6]),
        ([4, 5, 6], 1, [4, 5, 6]),  # resumed from elsewhere
        ([4, 5, 6], 3, [5, 6]),  # the same, where its first entry begins is not known
    ],
)
def test_entries_over_other_steps_are_not_compared(
    tmp_path: Path, other: list[int], logging_steps: int, common: list[int]
) -> None:
    a = open_run(with_steps(tmp_path / "a", [1, 2, 3, 4, 5, 6]))
    b = open_run(with_steps(tmp_path / "b", other, logging_steps=logging_steps))
    both = common_series(a, b, "loss")
    assert both.steps_N.tolist() == both.a_N.tolist() == both.b_N.tolist() == common


def test_entries_without_a_loss_are_no_steps(tmp_path: Path) -> None:
    a = open_run(make_run(tmp_path / "a", evaluations=[{"step": 0, "validation_loss": 1.0}]))
    b = open_run(make_run(tmp_path / "b"))
    assert common_series(a, b, "loss").steps_N.tolist() == [1, 2, 3]


def test_a_figure_written_as_null_is_not_a_number(tmp_path: Path) -> None:
    a, b = open_run(make_run(tmp_path / "a", losses=[0.5, None])), open_run(make_run(tmp_path / "b", losses=[0.5, 0.5]))
    assert common_series(a, b, "loss").relative_difference_N.tolist() == [0, np.inf]


def test_speed_leaves_the_first_entry_out(tmp_path: Path) -> None:
    """10, 20 and 30 images per second at 2 images per step."""
    speed = measure_speed(open_run(make_run(tmp_path / "a")))
    assert speed.steps_N.tolist() == [2, 3]
    np.testing.assert_allclose(speed.step_time_N, [2 / 20, 2 / 30])
    np.testing.assert_allclose(speed.data_wait_share_N, [0.01 / 0.1, 0.01 / (2 / 30)])
    assert percentile(speed.images_per_second_N, 50) == 25
    assert percentile(np.array([np.nan]), 50) is None
