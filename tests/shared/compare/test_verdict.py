"""The verdict follows the figures: a loss or a weight beyond the tolerance, and only that, makes runs disagree."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.compare.__main__ import main
from shared.compare.comparison import compare
from shared.compare.drift import Distance, Drift, TensorDistance
from shared.compare.run import Run, open_run
from shared.compare.series import Series
from shared.compare.verdict import CONTROLNET_TOLERANCE, LOSS_TOLERANCE, judge
from tests.shared.compare.run_folders import LOSSES, WEIGHTS, make_run, scaled

Losses = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30)
SIDES = st.sampled_from([-1, 1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(make_run(tmp_path_factory.mktemp("runs") / "any"))


def series(a: list[float], b: list[float]) -> Series:
    return Series(np.arange(1, len(a) + 1), np.array(a), np.array(b))


def drift(relative: float) -> Drift:
    """Parameters a = 1 and b = 1 - relative."""
    return Drift([TensorDistance("weight", 1, Distance(relative**2, 1.0, (1 - relative) ** 2))])


@given(losses=Losses)
def test_equal_runs_agree(run: Run, losses: list[float]) -> None:
    verdict = judge(run, run, series(losses, losses), drift(0.0))
    assert verdict.agree
    assert (verdict.loss, verdict.controlnet, verdict.first_step_apart) == (0.0, 0.0, None)


@given(losses=Losses, position=st.integers(0, 29), share=st.floats(0, 0.99), side=SIDES)
def test_a_loss_within_the_tolerance_changes_nothing(
    run: Run, losses: list[float], position: int, share: float, side: int
) -> None:
    other = list(losses)
    other[position % len(losses)] *= 1 + side * share * LOSS_TOLERANCE
    assert judge(run, run, series(losses, other), drift(0.0)).agree


@given(losses=Losses, position=st.integers(0, 29), times=st.floats(1.01, 1e4), side=SIDES)
def test_one_loss_beyond_the_tolerance_is_found(
    run: Run, losses: list[float], position: int, times: float, side: int
) -> None:
    position %= len(losses)
    other = list(losses)
    other[position] *= (1 + times * LOSS_TOLERANCE) ** side
    for both in (series(losses, other), series(other, losses)):
        verdict = judge(run, run, both, drift(0.0))
        assert not verdict.agree
        assert verdict.controlnets_agree
        assert verdict.loss_step == verdict.first_step_apart == position + 1


@given(share=st.floats(0, 0.999), times=st.floats(1.001, 999))
def test_the_controlnet_decides_too(run: Run, share: float, times: float) -> None:
    same = series([0.5], [0.5])
    assert judge(run, run, same, drift(share * CONTROLNET_TOLERANCE)).agree
    verdict = judge(run, run, same, drift(times * CONTROLNET_TOLERANCE))
    assert not verdict.agree
    assert verdict.losses_agree


@pytest.mark.parametrize("missing", [np.nan, np.inf])
def test_a_loss_that_is_no_number_never_agrees(run: Run, missing: float) -> None:
    assert not judge(run, run, series([0.5, missing], [0.5, 0.5]), drift(0.0)).agree
    assert not judge(run, run, series([0.5, missing], [0.5, missing]), drift(0.0)).agree


@pytest.mark.parametrize(
    ("loss_factor", "weight_factor", "exit_code"),
    [(1, 1, 0), (1.0009, 1.0009, 0), (1.0011, 1, 1), (1, 1.0012, 1), (1.1, 1.1, 1)],
)
def test_the_exit_code_follows_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loss_factor: float, weight_factor: float, exit_code: int
) -> None:
    a = make_run(tmp_path / "a")
    b = make_run(
        tmp_path / "b",
        losses=[LOSSES[0], LOSSES[1] * loss_factor, LOSSES[2]],
        weights=scaled(WEIGHTS, weight_factor),
        report={"backend": "torch"},
    )
    assert main([str(a), str(b)]) == exit_code
    said = capsys.readouterr().out
    assert ("Flax and PyTorch agree:" in said) == (exit_code == 0)
    assert ("Flax and PyTorch do NOT agree:" in said) == (exit_code == 1)
    assert "tolerance 1e-03" in said
    assert str(tmp_path / "comparison_a_b.html") in said
    assert (tmp_path / "comparison_a_b.html").is_file()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, None),
        ({"mixed_precision": "no"}, None),
        ({"mixed_precision": "bf16"}, "bf16"),
        ({"allow_tf32": True}, "TF32"),
    ],
)
def test_it_says_that_the_tolerances_are_for_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, object], named: str | None
) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", **settings)
    assert compare(a, b).verdict.reduced_precision == named
    main([str(a), str(b)])
    assert ("The tolerances are for float32." in capsys.readouterr().out) == (named is not None)
    page = (tmp_path / "comparison_a_b.html").read_text(encoding="utf-8")
    assert ("The tolerances are for float32." in page) == (named is not None)


def test_flags_that_may_differ_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a", learning_rate=1e-4), make_run(tmp_path / "b", learning_rate=1e-5)
    assert main([str(a), str(b)]) == 0
    assert "Flags that differ: learning_rate" in capsys.readouterr().out
