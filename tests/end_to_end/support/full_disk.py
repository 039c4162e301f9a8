"""A disk that fills up while a run saves a checkpoint."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

from shared.checkpoints.policy import checkpoints_in

LIMIT = 250_000  # bytes: more than what a run writes beside checkpoints, of which each has 9 MB in a few files


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on the size of a file fails a write in the middle of it as a full disk does, without a disk to fill."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    written_if_longer = jax.config.jax_persistent_cache_min_compile_time_secs
    # JAX would leave half of a compiled program in the cache that all tests share.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", written_if_longer)


def assert_a_checkpoint_without_room_ends_the_run(
    main: Callable[[list[str]], int], command: list[str], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a message that names the one that the run was resumed from; nothing half written is left.

    The Flax backend hears of a failure at the next checkpoint, which must not be that of the last step.
    """
    (complete,) = checkpoints_in(run)
    capfd.readouterr()
    with full_disk():
        assert main(command) == 2
    output = capfd.readouterr().err
    assert "Traceback" not in output
    _, _, message = output.partition("\nerror: ")
    assert message.startswith(f"A checkpoint could not be written to {run} (")
    assert "File too large" in message
    assert f"Complete checkpoints there: {complete.name}." in message
    assert checkpoints_in(run) == [complete]
