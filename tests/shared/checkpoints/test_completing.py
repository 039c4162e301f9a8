"""A checkpoint gets its name in one move: whenever the process ends, one of that step is there and whole."""

import os
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from shared.checkpoints.choice import checkpoint_to_resume
from shared.checkpoints.completing import complete, remove_unfinished, tidy
from shared.checkpoints.digests import Verdict, examine, write_digests
from shared.checkpoints.policy import checkpoints_in

CHANGES = ("rename", "replace", "unlink", "rmdir", "fsync", "remove")
"""What of `os` a checkpoint gets its name by, and what makes that safe."""


class Killed(BaseException):
    """The end of a process, as far as the disk sees it."""


def checkpoint(run: Path, name: str, content: str) -> Path:
    folder = run / name
    (folder / "controlnet").mkdir(parents=True)
    (folder / "controlnet" / "weights").write_text(content)
    (folder / "state.json").write_text(content)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_digests(checkpoint(tmp_path, "checkpoint-2", "before"))
    write_digests(checkpoint(tmp_path, "checkpoint-4", "old"))
    return tmp_path


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Fail from the numbered change of the disk on, as a process does that is no more."""
    seen = count()
    for name in CHANGES:
        really = getattr(os, name)

        def change(*arguments: Any, really: Any = really, **options: Any) -> Any:
            if next(seen) >= number:
                raise Killed
            return really(*arguments, **options)

        monkeypatch.setattr(os, name, change)


def content(folder: Path) -> set[str]:
    return {path.read_text() for path in (folder / "state.json", folder / "controlnet" / "weights")}


def test_a_step_that_exists_is_replaced(run: Path) -> None:
    complete(checkpoint(run, "checkpoint-4.unfinished", "new"), run / "checkpoint-4")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert content(run / "checkpoint-4") == {"new"}
    assert examine(run / "checkpoint-4") == Verdict(True, ())


def test_killed_at_any_moment_one_of_the_step_is_left(
    run: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder over and over, killed one change later each time, until nothing is left to be killed at."""
    unnamed = 0
    for number in count():
        unfinished = checkpoint(run, "checkpoint-4.unfinished", f"new {number}")
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                complete(unfinished, run / "checkpoint-4")
                killed = False
            except Killed:
                killed = True
        unnamed += not (run / "checkpoint-4").exists()
        tidy(run)
        remove_unfinished(run)
        assert checkpoint_to_resume(run, "latest") == run / "checkpoint-4"
        assert examine(run / "checkpoint-4") == Verdict(True, ())
        assert len(content(run / "checkpoint-4")) == 1
        assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-4"]
        if not killed:
            break
    assert content(run / "checkpoint-4") == {f"new {number}"}
    assert number > 8, "it was hardly ever killed"
    assert unnamed >= 1, "it was never killed between the two names"


def test_killed_while_it_is_put_right_it_is_put_right_the_next_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in count():
        (run / "checkpoint-4").rename(run / "checkpoint-4.replaced")
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                tidy(run)
                break
            except Killed:
                tidy_again = True
        tidy(run)
        assert content(run / "checkpoint-4") == {"old"}
    assert tidy_again


def test_a_disk_that_refuses_the_new_one_leaves_the_old_one_in_its_place(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = checkpoint(run, "checkpoint-4.unfinished", "new")
    really = os.rename

    def refuse(source: Any, target: Any) -> None:
        if Path(source) == unfinished:
            raise OSError(28, "No space left on device")
        really(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="No space left"):
        complete(unfinished, run / "checkpoint-4")
    assert content(run / "checkpoint-4") == {"old"}
    assert checkpoints_in(run) == [run / "checkpoint-2", run / "checkpoint-4"]


def test_one_that_made_way_goes_once_the_other_is_there(run: Path) -> None:
    checkpoint(run, "checkpoint-4.replaced", "older still")
    tidy(run)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert content(run / "checkpoint-4") == {"old"}


def test_only_checkpoints_of_this_folder_get_a_name_back(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    checkpoint(outside, "precious", "precious")
    run.mkdir()
    (run / "checkpoint-3.replaced").symlink_to(outside / "precious")
    for name in ("checkpoint-٣.replaced", "checkpoint-.replaced", "checkpoint-007.replaced", "x-checkpoint-1.replaced"):
        (run / name).mkdir()
    names = {path.name for path in run.iterdir()}
    tidy(run)
    assert {path.name for path in run.iterdir()} == names
    assert content(outside / "precious") == {"precious"}
    tidy(tmp_path / "not there")


def test_what_an_older_version_was_deleting_goes(tmp_path: Path) -> None:
    (tmp_path / "checkpoints.deleted" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "checkpoint-4").mkdir()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    remove_unfinished(tmp_path)
