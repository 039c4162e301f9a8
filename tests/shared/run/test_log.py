"""The figures of a run: counts, windows, speeds."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.run.log import (
    NonFiniteError,
    RunLog,
    StepBreakdown,
    StepFigures,
    banner,
)
from shared.tracking import Tracker
from shared.tracking.metrics_file import MetricsFile

finite = st.floats(-1e6, 1e6)


class Recorded:
    """A tracker's destination that remembers."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.entries.append((step, dict(metrics)))

    def images(self, tag: str, images: object, step: int) -> None: ...

    def truncate_after(self, step: int) -> None: ...

    def close(self) -> None: ...


def run_log(
    last_step: int, logging_steps: int = 1, first_step: int = 0, epoch_size: int | None = None, **others: Any
) -> tuple[RunLog, Recorded]:
    recorded = Recorded()
    log = RunLog(
        tracker=Tracker([recorded]),
        first_step=first_step,
        last_step=last_step,
        global_batch_size=8,
        epoch_size=epoch_size,
        logging_steps=logging_steps,
        **others,
    )
    return log, recorded


def figures(step: int, loss: float = 0.5, grad_norm: float = 2.0, data_wait: float = 0.25) -> StepFigures:
    return StepFigures(step, loss, grad_norm, step / 100, data_wait, finished_at=time.perf_counter())


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_banner_is_aligned() -> None:
    lines = banner("Training", {"Steps": 10, "Batch size": "8 images", "X": ""}).splitlines()
    assert lines == ["***** Training *****", "  Steps       10", "  Batch size  8 images", "  X           "]


# --- windows ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=20), st.integers(1, 7), st.integers(0, 9))
def test_every_entry_is_the_mean_since_the_entry_before(
    values: list[tuple[float, float, float]], logging_steps: int, first_step: int
) -> None:
    last_step = first_step + len(values)
    log, recorded = run_log(last_step, logging_steps, first_step)
    for step, (loss, grad_norm, data_wait) in enumerate(values, first_step + 1):
        log.add(figures(step, loss, grad_norm, data_wait))
    log.close()

    boundaries = [
        step for step in range(first_step + 1, last_step + 1) if step % logging_steps == 0 or step == last_step
    ]
    assert [step for step, _ in recorded.entries] == boundaries
    for begin, (end, entry) in zip([first_step, *boundaries], recorded.entries, strict=False):
        means = np.mean(values[begin - first_step : end - first_step], axis=0)
        np.testing.assert_allclose([entry["loss"], entry["grad_norm"], entry["data_wait"]], means, atol=1e-6)
        assert entry["learning_rate"] == end / 100
    assert log.last_loss == values[-1][0]


def test_an_interrupted_run_writes_its_last_partial_window() -> None:
    log, recorded = run_log(last_step=100, logging_steps=4)
    for step in range(1, 7):
        log.add(figures(step, loss=step))
    log.close()
    assert [(step, entry["loss"]) for step, entry in recorded.entries] == [(4, 2.5), (6, 5.5)]


def test_epochs_are_counted_where_their_length_is_known() -> None:
    log, recorded = run_log(last_step=3, epoch_size=16)
    for step in (1, 2, 3):
        log.add(figures(step))
    log.close()
    assert [entry["epoch"] for _, entry in recorded.entries] == [0.5, 1.0, 1.5]

    log, recorded = run_log(last_step=1)
    log.add(figures(1))
    log.close()
    assert "epoch" not in recorded.entries[0][1]


def test_the_loss_scale_is_logged_where_there_is_one() -> None:
    log, recorded = run_log(last_step=4, logging_steps=2)
    for step, scale in ((1, 8.0), (2, 4.0), (3, None), (4, None)):
        log.add(dataclasses.replace(figures(step), loss_scale=scale))
    log.close()
    assert [entry.get("loss_scale") for _, entry in recorded.entries] == [4.0, None]
    assert "loss_scale" not in recorded.entries[1][1]


@given(finite, finite)
def test_finite_figures_pass(loss: float, grad_norm: float) -> None:
    figures(1, loss, grad_norm).check()


@given(finite, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_figure_that_is_not_finite_stops_the_run_at_its_step(good: float, bad: float) -> None:
    for wrong in (figures(7, loss=bad, grad_norm=good), figures(7, loss=good, grad_norm=bad)):
        with pytest.raises(NonFiniteError, match=r"at step 7 .*(nan|inf).*--learning_rate"):
            wrong.check()


def test_an_evaluation_is_written_with_the_step_it_was_taken_after() -> None:
    log, recorded = run_log(last_step=100, logging_steps=4)
    for step in range(1, 7):
        log.add(figures(step, loss=step), {"validation_loss": 0.125} if step == 3 else None)
    log.close()
    assert [(step, entry["loss"]) for step, entry in recorded.entries] == [(3, 2.0), (4, 4.0), (6, 5.5)]
    assert [entry.get("validation_loss") for _, entry in recorded.entries] == [0.125, None, None]


def test_the_last_figures_are_at_hand() -> None:
    log, recorded = run_log(last_step=2)
    log.add(figures(1))
    log.add(figures(2, loss=0.25))
    log.close()
    assert log.last_loss == 0.25
    assert log.images_per_second == recorded.entries[-1][1]["images_per_second"]
    assert math.isfinite(log.images_per_second)


def test_entries_reach_the_runs_own_file(tmp_path: Path) -> None:
    tracker = Tracker([MetricsFile(tmp_path / "metrics.jsonl")])
    log = RunLog(tracker=tracker, first_step=0, last_step=2, global_batch_size=8, epoch_size=16, logging_steps=1)
    for step in (1, 2):
        log.add(figures(step))
    log.close()
    tracker.close()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert set(entries[0]) == {"step", "loss", "grad_norm", "learning_rate", "images_per_second", "data_wait", "epoch"}


# --- speed -----------------------------------------------------------------------------------------------------------


class Clock:
    """A `time.perf_counter` that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def finish(self, step: int, after: float) -> StepFigures:
        self.now += after
        return StepFigures(step, 0.5, 2.0, 0.01, 0.25, finished_at=self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("shared.run.log.time.perf_counter", clock)
    return clock


def test_images_per_second_divides_by_the_time_that_passed(clock: Clock) -> None:
    log, recorded = run_log(last_step=6, logging_steps=2)
    for step, seconds in enumerate([9.0, 0.1, 0.2, 0.3, 0.4, 0.1], 1):  # the first compiles
        log.add(clock.finish(step, seconds))
    log.close()
    speeds = [entry["images_per_second"] for _, entry in recorded.entries]
    assert speeds == pytest.approx([8 / 0.1, 16 / 0.5, 16 / 0.5])
    assert log.images_per_second == speeds[-1]


def test_time_for_saving_and_validation_does_not_count(clock: Clock) -> None:
    log, recorded = run_log(last_step=4, logging_steps=4)
    log.add(clock.finish(1, 9.0))
    log.add(clock.finish(2, 0.2))
    clock.now += 5
    log.restart_clock()
    log.add(clock.finish(3, 0.3))
    log.add(clock.finish(4, 0.2))
    log.close()
    assert recorded.entries[0][1]["images_per_second"] == pytest.approx(8 / 0.2)


def test_speed_is_that_of_steps_beside_no_break(clock: Clock) -> None:
    """A device tells of a step when it is through with half of the next; before a break there is no next one."""
    log, recorded = run_log(last_step=8)
    for step, seconds in enumerate([1.9, 0.2, 0.2, 0.1, 0.3, 0.2, 0.2, 0.1], 1):
        log.add(clock.finish(step, seconds), before_break=step in (4, 8))
        if step == 4:
            clock.now += 1
            log.restart_clock()
    log.close()
    first, *others = [entry["images_per_second"] for _, entry in recorded.entries]
    assert first == pytest.approx(8 / 1.9), "nothing better is known yet"
    assert others == pytest.approx([8 / 0.2] * 7)
    assert log.images_per_second == others[-1]


def test_the_first_step_of_each_size_tells_nothing_of_speed(clock: Clock) -> None:
    """It may compile, or try out kernels. Which sizes a speed is of is told to what is made from it."""
    told: list[list[tuple[int, int]]] = []
    log, recorded = run_log(
        last_step=6, logging_steps=6, speed_figures=lambda speed, sizes: told.append(list(sizes)) or {}
    )
    wide, tall = (80, 48), (48, 80)
    for step, (seconds, size) in enumerate(
        [(9.0, wide), (0.2, wide), (7.0, tall), (0.4, tall), (0.1, wide), (0.1, tall)], 1
    ):
        log.add(dataclasses.replace(clock.finish(step, seconds), size=size))
    log.close()
    assert recorded.entries[0][1]["images_per_second"] == pytest.approx(4 * 8 / 0.8)
    assert told == [[wide, tall, wide, tall]]
    assert log.speed()["images_per_second"] == log.images_per_second


def test_a_pause_before_the_first_step_does_not_count(clock: Clock) -> None:
    log, recorded = run_log(last_step=1)
    clock.now += 5
    log.restart_clock()
    log.add(clock.finish(1, 0.5))
    log.close()
    assert recorded.entries[0][1]["images_per_second"] == pytest.approx(8 / 0.5)


# --- where the time went ---------------------------------------------------------------------------------------------


def test_the_first_step_is_timed_from_the_start(caplog: pytest.LogCaptureFixture) -> None:
    started = time.perf_counter()
    log, _ = run_log(last_step=2, started=started)
    assert log.seconds_to_first_step is None
    with caplog.at_level(logging.INFO, "shared"):
        for step in (1, 2):
            log.add(StepFigures(step, 0.5, 2.0, 0.1, 0.25, finished_at=started + 10 * step))
    assert log.seconds_to_first_step == pytest.approx(10)
    assert [record.message for record in caplog.records] == ["The first step is done, 10.0 s after the start"]


def test_a_breakdown_is_logged_at_every_break_and_leaves_the_first_step_out(caplog: pytest.LogCaptureFixture) -> None:
    log, recorded = run_log(last_step=5)
    begin = time.perf_counter()
    with caplog.at_level(logging.INFO, "shared"):
        for step, finished in ((1, 100), (2, 102), (3, 104)):
            log.add(StepFigures(step, 0.5, 2.0, 0.1, 0.5, begin + finished, host_to_device=0.02))
        log.restart_clock()
        log.restart_clock()  # no steps since the last one, nothing to say
        log.close()
    messages = [record.message for record in caplog.records if "steps of" in record.message]
    assert messages == ["2 steps of 2 s: waiting for data 500 ms (25%), host to device 20 ms (1%), step 1.48 s (74%)"]
    assert [entry["host_to_device"] for _, entry in recorded.entries] == pytest.approx([0.02] * 3)


def test_what_a_backend_does_not_measure_is_left_out() -> None:
    breakdown = StepBreakdown()
    breakdown.add(figures(2, data_wait=0.125), seconds=0.5)
    assert str(breakdown) == "1 steps of 500 ms: waiting for data 125 ms (25%), step 375 ms (75%)"


def test_figures_made_from_the_speed_are_logged_with_it() -> None:
    log, recorded = run_log(last_step=1, speed_figures=lambda speed, sizes: {"doubled": 2 * speed})
    log.add(figures(1))
    log.close()
    (entry,) = (entry for _, entry in recorded.entries)
    assert entry["doubled"] == 2 * entry["images_per_second"]
