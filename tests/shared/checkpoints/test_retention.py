"""Which checkpoints go when another one is complete."""

from pathlib import Path

import pytest

from shared.checkpoints.policy import checkpoints_in
from shared.checkpoints.retention import delete_older, is_timed, mark_timed


def checkpoint(run: Path, step: int, *, timed: bool = False) -> Path:
    path = run / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if timed:
        mark_timed(path)
    return path


@pytest.mark.parametrize(
    ("keep", "completed_is_timed", "left"),
    [
        (None, False, [2, 4, 6, 9]),
        (None, True, [2, 4, 6, 9]),
        (2, False, [6, 9]),
        (2, True, [4, 6, 9]),
        (1, True, [6, 9]),
    ],
)
def test_timed_ones_go_and_count_for_nothing(
    tmp_path: Path, keep: int | None, completed_is_timed: bool, left: list[int]
) -> None:
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    for step in (3, 8):
        checkpoint(tmp_path, step, timed=True)
    delete_older(checkpoint(tmp_path, 9, timed=completed_is_timed), keep)
    assert checkpoints_in(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in left]


def test_one_of_a_later_step_is_of_a_course_that_was_left(tmp_path: Path) -> None:
    for step in (8, 9):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 10, timed=True)
    delete_older(checkpoint(tmp_path, 5), keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-5", "checkpoint-9"]


def test_a_link_marks_nothing(tmp_path: Path) -> None:
    timed, other = checkpoint(tmp_path, 1, timed=True), checkpoint(tmp_path, 2)
    (other / "timed.txt").symlink_to(timed / "timed.txt")
    assert [is_timed(timed), is_timed(other)] == [True, False]
