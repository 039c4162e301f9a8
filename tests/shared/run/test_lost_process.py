"""What is said, and the exit code, when a process of several is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.run.lost_process import LOST_PROCESS, LostProcessError, told_when_a_process_is_lost

PROJECT = Path(__file__).resolve().parents[3]
OF_GLOO = "[external/gloo/gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:6567: Connection reset by peer"
OF_JAX = "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout."
OF_NCCL = "NCCL error: remote process exited or there was a network error"
OTHERS = ["RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", "NCCL error: unhandled cuda error", "shape mismatch"]

WITNESSED = """
import os, sys
from pathlib import Path
from shared.run.lost_process import told_when_a_process_is_lost

with told_when_a_process_is_lost(Path(sys.argv[1]), is_one_of_several=True):
    exec(sys.argv[2])
"""


@pytest.mark.parametrize("words", [OF_GLOO, OF_JAX, OF_NCCL])
def test_what_libraries_say_of_a_lost_process_becomes_a_sentence(tmp_path: Path, words: str) -> None:
    for step in (9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with (
        pytest.raises(LostProcessError, match=r"A process .* was lost.*on all hosts.* goes on from checkpoint-12\."),
        told_when_a_process_is_lost(tmp_path, is_one_of_several=True),
    ):
        raise RuntimeError(words)


@pytest.mark.parametrize("words", OTHERS)
def test_other_errors_are_left_as_they_are(tmp_path: Path, words: str) -> None:
    with pytest.raises(RuntimeError, match=words), told_when_a_process_is_lost(tmp_path, is_one_of_several=True):
        raise RuntimeError(words)


def test_a_single_process_has_none_to_lose(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="gloo"), told_when_a_process_is_lost(tmp_path, is_one_of_several=False):
        raise RuntimeError(OF_GLOO)


@pytest.mark.parametrize(
    ("end", "is_said"),
    [("pass", False), ("sys.exit(2)", False), ("os.abort()", True), ("os.kill(os.getpid(), 9)", True)],
)
def test_a_witness_speaks_for_a_process_that_ended_without_a_word(tmp_path: Path, end: str, is_said: bool) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITNESSED, tmp_path, end], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    said = "Start the same command again on all hosts, with --resume_from_checkpoint latest: it starts afresh"
    assert (said in ended.stderr) == is_said
    assert ended.stderr.count("\n") == is_said


def test_the_exit_code_is_the_one_for_failures_that_pass() -> None:
    """EX_TEMPFAIL, and neither a mistake's, nor a defect's, nor a signal's."""
    assert os.EX_TEMPFAIL == LOST_PROCESS
