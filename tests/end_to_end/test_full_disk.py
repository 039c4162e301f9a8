"""The disk fills up while a run saves a checkpoint, writes its figures, or saves its result."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import train_flax
from shared.checkpoints.policy import checkpoints_in
from tests.end_to_end.support.comparing import trained_weights
from tests.end_to_end.support.running import main_of_train_torch, untimed_metrics
from tests.end_to_end.support.tiny_runs import PROMPT, STEPS, arguments, begin_from

MESH = ["--parallelism", "mesh", "--fsdp_devices", 4]
ONE_ROW_EACH = ["--train_batch_size", 1]
LIMIT = 250_000  # bytes: more than what a run writes beside checkpoints, of which each has 9 MB in a few files
RESUME = ["--resume_from_checkpoint", "latest"]


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """A limit on the size of a file fails a write in the middle of it as a full disk does, without a disk to fill."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.parametrize(
    ("main", "more"),
    [(train_flax.main, ONE_ROW_EACH), (train_flax.main, [*ONE_ROW_EACH, *MESH]), (main_of_train_torch, [])],
    ids=["flax", "flax-mesh", "torch"],
)
def test_a_run_goes_on_from_what_the_full_disk_left(
    main: Callable[[list[str]], int],
    more: list[object],
    base_model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    # The Flax backend hears of a failure at the next checkpoint, which must not be that of the last step.
    more = [*more, "--max_train_steps", 8]
    assert main(arguments(base_model, whole, *more)) == 0
    begin_from(whole, 2, part)
    capfd.readouterr()
    with full_disk(LIMIT):
        assert main(arguments(base_model, part, *more, *RESUME)) == 2
    output = capfd.readouterr().err
    assert "Traceback" not in output
    _, _, message = output.partition("\nerror: ")
    assert message.startswith(f"A checkpoint could not be written to {part} (")
    assert "File too large" in message
    assert "Complete checkpoints there: checkpoint-2." in message
    assert checkpoints_in(part) == [part / "checkpoint-2"]

    assert main(arguments(base_model, part, *more, *RESUME)) == 0
    assert untimed_metrics(part) == untimed_metrics(whole)
    for name, value in trained_weights(whole).items():
        assert (trained_weights(part)[name] == value).all(), name


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
    with full_disk(LIMIT):
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
