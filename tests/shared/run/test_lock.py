"""One run at a time in a folder, whatever became of the one before."""

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shared.run.lock import LOCK_FILE, run_lock

HOLDER = """
import sys, time
from pathlib import Path
from shared.run.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_told_of_the_first(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    try:
        with pytest.raises(ValueError, match="in use by another run") as error, run_lock(tmp_path):
            pass
        assert f"process {holder.pid} on {socket.gethostname()}, since " in str(error.value)
        assert "another --output_dir" in str(error.value)
        assert str(holder.pid) in (tmp_path / LOCK_FILE).read_text()
    finally:
        holder.communicate("\n")
    assert not (tmp_path / LOCK_FILE).exists()
    with run_lock(tmp_path):
        pass


def test_death_releases_it_and_the_file_is_taken_over(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert "may be deleted" in (tmp_path / LOCK_FILE).read_text()
    with run_lock(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK_FILE).read_text()
    assert not (tmp_path / LOCK_FILE).exists()


def test_two_runs_of_one_process_conflict_and_may_follow_each_other(tmp_path: Path) -> None:
    for _ in range(2):
        with run_lock(tmp_path), pytest.raises(ValueError, match="in use"), run_lock(tmp_path):
            pass
    with pytest.raises(RuntimeError, match="in the run"), run_lock(tmp_path):
        raise RuntimeError("in the run")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_run_removes_meanwhile_is_not_what_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened while the run before was ending, locked when its name was gone already."""
    flock = fcntl.flock
    removed: list[Path] = []

    def remove_first(descriptor: int, how: int) -> None:
        if not removed:
            removed.append(tmp_path / LOCK_FILE)
            removed[0].unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with run_lock(tmp_path):
        monkeypatch.undo()
        with pytest.raises(ValueError, match="in use"), run_lock(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_without_locks_a_run_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with run_lock(tmp_path):
        pass
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "has no locks" in warning
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("planted", ["link", "dangling link", "loop", "pipe", "folder"])
def test_what_takes_the_place_of_the_file_is_told(tmp_path: Path, planted: str) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    lock = folder / LOCK_FILE
    elsewhere.write_text("mine")
    if planted == "pipe":
        os.mkfifo(lock)
    elif planted == "folder":
        lock.mkdir()
    else:
        targets = {"link": elsewhere, "dangling link": tmp_path / "nowhere", "loop": lock}
        lock.symlink_to(targets[planted])
    with pytest.raises(ValueError, match=r"\.lock"), run_lock(folder):
        pass
    assert elsewhere.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "note", [b"", b"\xff\x00\x1b[2J" * 1000, b"process 1 on \x1b[2J, since then.\nerror: all is well"]
)
def test_what_the_file_says_is_not_believed(tmp_path: Path, note: bytes) -> None:
    with run_lock(tmp_path):
        (tmp_path / LOCK_FILE).write_bytes(note)
        with pytest.raises(ValueError, match="in use") as error, run_lock(tmp_path):
            pass
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


def test_a_full_disk_locks_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with run_lock(tmp_path), pytest.raises(ValueError, match="it does not say which"), run_lock(tmp_path):
        pass
