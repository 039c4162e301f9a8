"""cloud/train.sh: what an engine is told of how a training ended."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import jax
import pytest

from flax_trainer.distributed.joining import join_processes
from shared.config import TrainConfig
from tests.cloud.commands import CLOUD

TRAIN = CLOUD / "train.sh"

# Stops as the trainers do; its log says so after all else.
_TRAINING = """
import time
from shared.outgoing.messages import set_up_logging
from shared.run.interruption import Interruption

set_up_logging("shared")
with Interruption() as interruption:
    print("it trains", flush=True)
    while interruption.requested is None:
        time.sleep(0.01)
interruption.say_stopped()
raise SystemExit(interruption.exit_code)
"""


def ended(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TRAIN, "bash", "-c", script, "training", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("exit_code", [0, 1, 2, 130])
def test_its_exit_code_is_the_training_s(exit_code: int) -> None:
    done = ended(f"echo out; echo err >&2; exit {exit_code}")
    assert (done.returncode, done.stdout) == (exit_code, "out\nerr\n")


def test_a_training_that_is_killed_has_failed() -> None:
    assert ended("kill -KILL $$").returncode == 128 + signal.SIGKILL


def to_it_alone(process: subprocess.Popen[str]) -> None:
    process.terminate()


def to_all(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.parametrize("stop", [to_it_alone, to_all])
def test_a_training_that_was_stopped_is_to_be_continued(stop: Callable[[subprocess.Popen[str]], None]) -> None:
    process = subprocess.Popen(
        [TRAIN, sys.executable, "-c", _TRAINING],
        cwd=CLOUD.parent,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "it trains\n"
        stop(process)
        output, _ = process.communicate(timeout=60)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 75, output
    assert "Stopped by SIGTERM" in output


def test_hosts_that_have_not_found_each_other_are_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_is_there(*_: object, **__: object) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", nobody_is_there)
    with pytest.raises(ValueError, match="find each other") as error:
        join_processes(TrainConfig(coordinator_address="10.0.0.2:8476", num_processes=2, process_id=1))
    assert ended('echo "error: $1" >&2; exit 2', str(error.value)).returncode == 75
