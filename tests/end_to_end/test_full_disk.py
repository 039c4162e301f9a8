"""The disk fills up while a run saves a checkpoint."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import train_flax
from shared.checkpoint_policy import checkpoints_in
from tests.end_to_end.comparing import trained_weights
from tests.end_to_end.running import main_of_train_torch, untimed_metrics
from tests.end_to_end.tiny_runs import arguments, begin_from

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
