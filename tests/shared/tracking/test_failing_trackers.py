"""Disks that fill up and networks that hang: a tracker may fail, a training may not notice."""

import dataclasses
import errno
import logging
import os
import resource
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared import threads
from shared.config import TrainConfig
from shared.tracking import Tracker, background, check_trackers, open_trackers, read_metrics
from shared.tracking.background import BackgroundTracker, CaptionedImage
from shared.tracking.metrics_file import MetricsFile
from shared.tracking.tensorboard import TensorBoardTracker

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(background, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(background, "_LONGEST_PAUSE", 0.02)
    caplog.set_level(logging.INFO, "shared.tracking")


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """A limit on the size of a file fails a write in the middle of it as a full disk does."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_figures_wait_for_a_full_disk_and_are_all_there_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    with full_disk(130):  # in the middle of the fourth line
        for step in range(1, 10):
            file.log({"loss": step / 7}, step)
        assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]
        assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n"), "no half of a line"
    (warning,) = warnings_of(caplog)
    assert "File too large" in warning
    assert str(tmp_path / "metrics.jsonl") in warning
    file.log({"loss": 10 / 7}, 10)
    file.close()
    assert read_metrics(tmp_path) == [{"step": step, "loss": step / 7} for step in range(1, 11)]
    assert warnings_of(caplog) == [warning]
    assert "written again, with the 7 lines that waited" in caplog.text


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EDQUOT])
def test_any_error_of_the_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log({"loss": 1.0}, 1)

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        for name in ("pwrite", "ftruncate"):
            broken.setattr(os, name, fail)
        for step in (2, 3):
            file.log({"loss": 1.0}, step)
    file.close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]


def test_what_a_disk_that_stays_full_cost_is_said_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    with full_disk(10):
        for step in (1, 2):
            file.log({"loss": 1.0}, step)
        file.close()
    assert warnings_of(caplog)[1:] == [f"2 entries are missing in {tmp_path / 'metrics.jsonl'}"]


def test_a_link_in_the_files_place_is_neither_read_nor_written(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text('{"step": 1}\n')
    (tmp_path / "metrics.jsonl").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is a link"):
        MetricsFile(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").is_symlink()
    assert elsewhere.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"null",
        b'"step"',
        b"{}",
        b"{",
        b"\xff\x00",
        b'{"step": "1"}',
        b'{"step": null}',
        b'{"step": true}',
        b'{"step": -1}',
        b'{"step": 1.5}',
        b'{"step": 1e400}',
        b'{"step": 1e300}',
        b'{"step": ' + b"1" * 400 + b"}",
        b'{"step": NaN}',
        b'{"step": 1, "loss": [1]}',
        b'{"step": 1, "loss": "0.5"}',
        b'{"step": 1, "loss": true}',
        b'{"step": 1, "loss": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"step": 1, "\\ud83d": 1}',
        b"\x00" * 100,
        b"",
    ],
    ids=lambda line: repr(line[:24]),
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2") as error:
        read_metrics(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_what_is_no_file_of_metrics_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is a named pipe"):
        read_metrics(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read_metrics(tmp_path)
    path.rmdir()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is a device"):
        read_metrics(tmp_path)
    path.unlink()
    path.write_bytes(b"1" * (2**20 + 1) + b"\n")
    with pytest.raises(ValueError, match="no honest run"):
        read_metrics(tmp_path)


def test_a_missing_or_empty_file_has_no_entries(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1')
    assert read_metrics(tmp_path) == []


# --- any other destination -------------------------------------------------------------------------------------------


class Recorder:
    """A destination that does as it is told."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.error: Exception | None = None
        self.refused: set[int] = set()
        self.holds = threading.Event()
        self.holds.set()
        self.opened = self.closed = 0

    def open(self) -> "Recorder":
        self.opened += 1
        return self

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.holds.wait()
        if self.error is not None:
            raise self.error
        if step in self.refused:
            raise TypeError("no such figure")
        self.taken.append(step)

    def images(self, tag: str, images: Sequence[CaptionedImage], step: int) -> None:
        self.log({}, step)

    def truncate_after(self, step: int) -> None:
        self.taken = [taken for taken in self.taken if taken <= step]

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("\x1b[2J"), KeyError(1)]
)
def test_a_destination_that_comes_back_gets_what_waited(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    tracker = BackgroundTracker("Somewhere", recorder.open)
    tracker.log({}, 1)
    wait_for(lambda: recorder.taken == [1])

    def open_when_it_works() -> Recorder:
        if recorder.error is not None:
            raise recorder.error
        return recorder.open()

    tracker._open = open_when_it_works
    recorder.error = error
    for step in range(2, 100):
        tracker.log({}, step)
    wait_for(lambda: recorder.closed == 1)
    time.sleep(0.1)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("Somewhere cannot be written to (")
    assert "metrics.jsonl" in warning
    assert "\x1b" not in warning
    recorder.error = None
    tracker.close()
    assert recorder.taken == list(range(1, 100))
    assert (recorder.opened, recorder.closed) == (2, 2)
    assert "Somewhere is written to again; 0 entries are missing there" in caplog.text
    assert warnings_of(caplog) == [warning]


def test_an_entry_that_is_never_taken_does_not_hold_up_the_others(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    recorder.refused = {3}
    tracker = BackgroundTracker("Somewhere", recorder.open)
    for step in range(6):
        tracker.log({}, step)
    wait_for(lambda: len(recorder.taken) == 5)
    tracker.close()
    assert recorder.taken == [0, 1, 2, 4, 5]
    assert "1 entries are missing" in caplog.text


def test_nobody_waits_for_a_destination_that_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "_SECONDS_TO_CLOSE", 0.2)
    monkeypatch.setattr(threads, "_left_behind", threading.Event())
    recorder = Recorder()
    recorder.holds.clear()
    tracker = BackgroundTracker("Somewhere", recorder.open)
    started = time.monotonic()
    for step in range(1000):
        tracker.log({}, step)
    tracker.close()
    assert time.monotonic() - started < 20
    assert threads._left_behind.is_set()
    assert "1000 entries are missing there, and it did not end in time" in caplog.text
    recorder.holds.set()


def test_what_waits_is_bounded_and_pictures_make_way_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_MOST_WAITING", 20_000)
    monkeypatch.setattr(background, "_SECONDS_FOR_ROOM", 0.2)
    recorder = Recorder()
    recorder.holds.clear()
    tracker = BackgroundTracker("Somewhere", recorder.open)
    tracker.log({}, 0)
    wait_for(lambda: tracker._waiting)
    for step in range(1, 15):
        tracker.images("picture", [("", IMAGE)], step)
        tracker.log({}, 100 + step)
        assert tracker._waiting_size <= 20_000
    recorder.holds.set()
    tracker.close()
    assert [step for step in recorder.taken if step > 100] == [100 + step for step in range(1, 15)]
    assert len([step for step in recorder.taken if 0 < step < 100]) <= 1


def test_a_destination_that_is_only_busy_gets_every_picture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "_MOST_WAITING", 2 * IMAGE.nbytes)
    recorder = Recorder()
    tracker = BackgroundTracker("Somewhere", recorder.open)
    for step in range(1, 20):
        tracker.images("picture", [("", IMAGE)], step)
        assert len(tracker._waiting) <= 2
    tracker.images("larger than the bound", [("", IMAGE)] * 3, 20)
    tracker.close()
    assert recorder.taken == list(range(1, 21))
    assert not warnings_of(caplog)


def test_a_destination_that_never_opens_again_ends_with_the_run(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    tracker = BackgroundTracker("Somewhere", recorder.open)
    recorder.error = OSError(errno.EIO, "Input/output error")
    for step in range(5):
        tracker.log({}, step)
    wait_for(lambda: recorder.closed > 0)
    tracker.close()
    assert not tracker._thread.is_alive()
    assert len(warnings_of(caplog)) == 2
    assert "5 entries are missing there" in warnings_of(caplog)[1]


# --- TensorBoard and Weights & Biases --------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return dataclasses.replace(TrainConfig(), report_to="tensorboard", output_dir=str(tmp_path / "run"))


def open_at(config: TrainConfig) -> Tracker:
    return open_trackers(config, Path(config.output_dir))


def events_of(config: TrainConfig) -> EventAccumulator:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    folder = Path(config.output_dir) / config.logging_dir / config.tracker_project_name
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_a_full_disk_under_tensorboard_loses_nothing(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    """What TensorBoard itself reads afterwards, from the files before and after."""
    tracker = open_at(config)
    tracker.truncate_after(-1)
    with full_disk(6_000):  # of each file
        for step in range(1, 301):
            tracker.log({"loss": step / 7, "learning_rate": 1e-4}, step)
            if step == 200:
                tracker.images("validation/0", [("a circle", IMAGE)], step)  # too large for any file
        wait_for(lambda: "cannot be written to" in caplog.text)
        time.sleep(0.3)
    tracker.close()
    events = events_of(config)
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in shown] == list(range(1, 301))
    np.testing.assert_allclose([value for _, value in shown], np.arange(1, 301) / 7, rtol=1e-6)
    assert [entry["step"] for entry in read_metrics(Path(config.output_dir))] != []
    assert "Weights" not in caplog.text


def test_tensorboard_without_any_room_is_no_half_a_file(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    tracker = open_at(config)
    tracker.truncate_after(-1)
    folder = Path(config.output_dir) / "logs" / "train_controlnet"
    wait_for(lambda: len(list(folder.iterdir())) == 2)
    with full_disk(1):
        tracker.log({"loss": 1.0}, 1)
        wait_for(lambda: "cannot be written to" in caplog.text)
        time.sleep(0.2)
        assert len(list(folder.iterdir())) == 2, "attempts leave no empty files"
    tracker.log({"loss": 2.0}, 2)
    tracker.close()
    assert [event.step for event in events_of(config).Scalars("loss")] == [1, 2]


def test_a_purge_without_any_room_leaves_the_open_file_open_and_closes_it_once(config: TrainConfig) -> None:
    tracker = TensorBoardTracker(config)
    descriptor = tracker._file._descriptor
    with full_disk(1), pytest.raises(OSError, match=r"File too large|No space"):
        tracker.truncate_after(3)
    os.fstat(descriptor)
    tracker.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_tracker_that_cannot_be_opened_is_told_before_work_starts(config: TrainConfig) -> None:
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "logs").write_text("a file")
    with pytest.raises(ValueError, match=r"TensorBoard cannot be opened \(NotADirectoryError"):
        open_at(config)


@pytest.mark.parametrize(
    "name", ["../elsewhere", "..", ".", "a/b", "/tmp/x", "a\\b", "a\x00b", "a\nb", "\ud83d", "n" * 256]
)
@pytest.mark.parametrize("report_to", ["tensorboard", "wandb", "none"])
def test_a_project_is_one_plain_folder(config: TrainConfig, name: str, report_to: Any) -> None:
    with pytest.raises(ValueError, match="--tracker_project_name") as error:
        check_trackers(dataclasses.replace(config, tracker_project_name=name, report_to=report_to))
    assert str(error.value).isprintable()


def test_wandb_goes_on_with_the_same_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[dict[str, Any]] = []
    taken: list[int] = []
    broken = threading.Event()

    class Run:
        id = "run-1"

        def log(self, entry: dict[str, Any], step: int) -> None:
            if broken.is_set():
                broken.clear()
                raise RuntimeError("the connection to the service is lost")
            taken.append(step)

        def finish(self) -> None:
            pass

    def init(**settings: Any) -> Run:
        runs.append(settings)
        return Run()

    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = open_at(dataclasses.replace(config, report_to="wandb"))
    tracker.log({"loss": 1.0}, 1)
    wait_for(lambda: taken == [1])
    broken.set()
    for step in (2, 3):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    assert taken == [1, 2, 3]
    assert [(settings.get("id"), settings.get("resume")) for settings in runs] == [(None, None), ("run-1", "allow")]
