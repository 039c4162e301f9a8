"""Which checkpoint is resumed where some are damaged, or have no digests."""

import logging
from pathlib import Path

import pytest

from shared.checkpoints.choice import check_same_choice, checkpoint_to_resume
from shared.checkpoints.digests import DIGESTS_FILE, write_digests
from shared.user_errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text(f"of step {step}")
        write_digests(folder)
    return tmp_path


def damage(*checkpoints: Path) -> None:
    for checkpoint in checkpoints:
        (checkpoint / "weights").write_text("of step X")


def test_the_newest_whole_one_is_taken_in_silence(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert checkpoint_to_resume(run, "latest") == run / "checkpoint-6"
        assert checkpoint_to_resume(run, "checkpoint-4") == run / "checkpoint-4"
    assert not caplog.records


def test_latest_passes_over_what_is_damaged_and_says_so(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(run / "checkpoint-6")
    (run / "checkpoint-4" / "weights").unlink()
    assert checkpoint_to_resume(run, "latest") == run / "checkpoint-2"
    first, second, taken = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"{run}/checkpoint-6 is passed over. It is damaged: weights is not what was written (")
    assert second == f"{run}/checkpoint-4 is passed over. It is damaged: weights is missing"
    assert taken == f"The run goes on from {run}/checkpoint-2 instead"


@pytest.mark.parametrize("by_path", [True, False])
def test_a_named_one_that_is_damaged_is_refused(run: Path, by_path: bool) -> None:
    damage(run / "checkpoint-4")
    given = str(run / "checkpoint-4") if by_path else "checkpoint-4"
    with pytest.raises(UserError, match=r"checkpoint-4 is damaged: weights is not.*--resume_from_checkpoint latest"):
        checkpoint_to_resume(run, given)


def test_where_all_are_damaged_nothing_starts_afresh(run: Path) -> None:
    damage(*run.iterdir())
    with pytest.raises(UserError) as refused:
        checkpoint_to_resume(run, "latest")
    message = str(refused.value)
    assert all(f"checkpoint-{step} is damaged: weights is not what was written" in message for step in (2, 4, 6))
    assert "another --output_dir" in message


@pytest.mark.parametrize("given", ["latest", "checkpoint-6"])
def test_one_without_digests_is_resumed_and_that_is_said(
    run: Path, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    (run / "checkpoint-6" / DIGESTS_FILE).unlink()
    damage(run / "checkpoint-6")
    with caplog.at_level(logging.INFO):
        assert checkpoint_to_resume(run, given) == run / "checkpoint-6"
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{run}/checkpoint-6 cannot be checked: it has no digests.json")


@pytest.mark.parametrize("there", [True, False])
def test_latest_without_checkpoints_starts_afresh_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, there: bool
) -> None:
    run = tmp_path if there else tmp_path / "new"
    with caplog.at_level(logging.INFO):
        assert checkpoint_to_resume(run, "latest") is None
    (record,) = caplog.records
    assert record.getMessage() == f"{run} holds no checkpoint to resume from yet: the run starts afresh"


def test_a_large_one_is_said_to_be_read(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.checkpoints.digests._SAID_IN_THE_LOG", 1)
    with caplog.at_level(logging.INFO):
        checkpoint_to_resume(run, "latest")
    assert "Checking the 0.0 GB of" in caplog.text


def test_processes_that_choose_differently_go_no_further() -> None:
    check_same_choice([None])
    check_same_choice([None, None])
    check_same_choice([4, 4, 4])
    with pytest.raises(UserError, match="process 0 checkpoint-6, process 1 checkpoint-4, process 2 none"):
        check_same_choice([6, 4, None])
