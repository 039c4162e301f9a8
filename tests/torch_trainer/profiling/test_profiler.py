"""Nothing but what is asked for is in a trace, and where one cannot be had, nothing else is missing."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jax.profiler import ProfileData
from torch.profiler import profile, record_function

from shared.config import TrainConfig
from shared.profiling.profiled_steps import profiled_steps
from torch_trainer.profiling import profiler as under_test
from torch_trainer.profiling.profiler import Profiler

CONFIG = TrainConfig()


def steps_of(profiler: Profiler, last: int) -> list[int]:
    """A loop; returns the steps after which a trace was written."""
    written = []
    for step in range(1, last + 1):
        profiler.before_step(step)
        with record_function(f"work of step {step}"):
            torch.ones(3) + 1
        if profiler.after_step(step):
            written.append(step)
    profiler.close()
    return written


def names_in(folder: Path) -> list[str]:
    """Ranges in the only trace there."""
    (trace,) = (folder / "plugins" / "profile").glob("*/*.xplane.pb")
    events = [
        event.name
        for plane in ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name.startswith(("work of", "train "))
    ]
    return sorted(events)


def test_a_trace_holds_its_steps_and_no_others(tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir=str(tmp_path), profile_steps=2)
    assert steps_of(Profiler(config, profiled_steps(config, 0, 6), 6, is_main=True), 6) == [4]
    folder = tmp_path / "logs" / "profile_steps"
    assert names_in(folder) == ["train 3", "train 4", "work of step 3", "work of step 4"]
    assert sorted(path.name for path in folder.iterdir()) == ["device_time.json", "plugins"], (
        "what it was made from is gone"
    )


def test_the_last_validation_has_a_trace_of_its_own(tmp_path: Path) -> None:
    profiler = Profiler(replace(CONFIG, output_dir=str(tmp_path), profile_validation=True), range(0), 4, is_main=True)
    for step in (2, 4):
        profiler.before_validation(step)
        with record_function(f"work of step {step}"):
            torch.ones(3) + 1
        profiler.after_validation(step)
    assert names_in(tmp_path / "logs" / "profile_validation") == ["work of step 4"]


@pytest.mark.parametrize("is_main", [True, False])
def test_without_flags_and_in_other_processes_nothing_is_written(tmp_path: Path, is_main: bool) -> None:
    flags = {} if is_main else {"profile_steps": 2, "profile_validation": True}
    config = replace(CONFIG, output_dir=str(tmp_path), **flags)
    profiler = Profiler(config, profiled_steps(config, 0, 6), 6, is_main=is_main)
    assert steps_of(profiler, 6) == []
    profiler.before_validation(6)
    profiler.after_validation(6)
    profiler.close()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_trace_is_ended_and_written(tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir=str(tmp_path), profile_steps=3)
    profiler = Profiler(config, range(1, 4), 6, is_main=True)
    profiler.before_step(1)
    with record_function("work of step 1"):
        torch.ones(3) + 1
    profiler.close()
    assert names_in(tmp_path / "logs" / "profile_steps") == ["train 1", "work of step 1"]
    with profile():  # would fail if one were still going on
        pass


def test_a_folder_that_cannot_be_written_costs_the_trace_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    config = replace(CONFIG, output_dir=str(tmp_path), profile_steps=1)
    steps_of(Profiler(config, range(3, 4), 6, is_main=True), 6)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith("A trace cannot be written")


def test_a_full_disk_leaves_no_half_of_a_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(under_test, "write_for_tensorboard", full)
    config = replace(CONFIG, output_dir=str(tmp_path), profile_steps=1)
    steps_of(Profiler(config, range(3, 4), 6, is_main=True), 6)
    assert "No space left on device" in caplog.text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_profiler_that_does_not_start_costs_the_trace_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def occupied() -> None:
        raise RuntimeError("CUPTI is used by another tool")

    monkeypatch.setattr(under_test, "profile", occupied)
    config = replace(CONFIG, output_dir=str(tmp_path), profile_steps=1)
    assert steps_of(Profiler(config, range(3, 4), 6, is_main=True), 6) == []
    assert "A trace cannot be written (RuntimeError: CUPTI is used by another tool)" in caplog.text
