"""The disk fills up while a run writes its figures or saves its result.

`test_training_run.py` and `test_parallelism.py` have checkpoints without room.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import train_flax
from tests.end_to_end.support.comparing import trained_weights
from tests.end_to_end.support.full_disk import full_disk
from tests.end_to_end.support.running import main_of_train_torch, untimed_metrics
from tests.end_to_end.support.tiny_runs import PROMPT, STEPS, arguments

ONE_ROW_EACH = ["--train_batch_size", 1]
RESUME = ["--resume_from_checkpoint", "latest"]


@pytest.mark.parametrize(
    ("main", "more"), [(train_flax.main, ONE_ROW_EACH), (main_of_train_torch, [])], ids=["flax", "torch"]
)
def test_a_disk_that_is_full_from_the_last_step_on_is_told_with_what_is_where(
    main: Callable[[list[str]], int],
    more: list[object],
    base_model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Neither the last checkpoint nor the weights have room; what is smaller is there, and another try ends well."""
    run = tmp_path / "run"
    command = [*arguments(base_model, run, *more), "--max_train_steps", "1", "--checkpointing_steps", "1"]
    with full_disk():
        assert main(command) == 2
    output = capfd.readouterr().err
    assert "Traceback" not in output
    _, _, message = output.partition("\nerror: ")
    assert message.startswith(f"The training is finished, but not everything could be written to {run} (")
    assert "the ControlNet missing" in message
    assert "The last complete checkpoint there is none" in message
    assert "A checkpoint could not be written" in output, "as a warning"
    assert {"report.json", "README.md", "metrics.jsonl"} <= {path.name for path in run.iterdir()}
    assert not list(run.glob("*.safetensors"))
    assert not (run / ".lock").exists()

    assert main([*command, *RESUME]) == 0
    assert trained_weights(run)
    assert "not_written" not in (run / "report.json").read_text()


@pytest.mark.parametrize(
    ("main", "more"), [(train_flax.main, ONE_ROW_EACH), (main_of_train_torch, [])], ids=["flax", "torch"]
)
def test_figures_and_pictures_without_room_cost_no_training(
    main: Callable[[list[str]], int],
    more: list[object],
    base_model: Path,
    condition: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first writes beyond 400 bytes of TensorBoard's files and of metrics.jsonl fail, and every picture."""
    run = tmp_path / "run"
    pwrite = os.pwrite
    failed: list[str] = []

    def full_for_a_while(descriptor: int, content: bytes, position: int) -> int:
        place = os.readlink(f"/proc/self/fd/{descriptor}")
        if len(failed) < 4 and position > 400 and ("metrics.jsonl" in place or "tfevents" in place):
            failed.append(place)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, content, position)

    monkeypatch.setattr(os, "pwrite", full_for_a_while)
    run.mkdir()
    (run / "validation").write_text("no folder")
    drawing = ["--validation_image", condition, "--validation_prompt", PROMPT, "--num_validation_images", 1]
    assert main(arguments(base_model, run, *more, *drawing, "--checkpointing_steps", 100)) == 0
    output = capfd.readouterr().err
    assert "Traceback" not in output
    assert "Validation images cannot be written" in output
    assert failed
    assert [entry["step"] for entry in untimed_metrics(run)] == list(range(1, STEPS + 1))
    assert trained_weights(run)
    assert (run / "report.json").is_file()
