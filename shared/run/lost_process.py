"""The end of a run of several processes, of which one was lost: a sentence that says how to go on, and an exit code.

`python3 -m shared.run.lost_process OUTPUT_DIR` waits for the end of what it reads, and says so too where no farewell
came before it. It is started beside each process of several, because a process that is killed, or that a library ends
in the middle of a call, says nothing any more.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from shared.checkpoints.policy import checkpoints_in
from shared.outgoing.messages import outgoing, with_indented_lines

LOST_PROCESS = 75
"""The exit code: EX_TEMPFAIL of sysexits.h, a failure that starting again mends."""

_FAREWELL = b"."
_ROOT = Path(__file__).parents[2]
# What gloo, NCCL and JAX's coordination service say when one that they talk to is gone.
_OF_LOST_PROCESS = re.compile(
    r"gloo|nccl.*(remote|network|abort|timeout)|heartbeat|coordination ?service|connection (reset|closed)|UNAVAILABLE",
    re.IGNORECASE | re.DOTALL,
)


class LostProcessError(Exception):
    """Another process of this run is gone."""


@contextmanager
def told_when_a_process_is_lost(output_dir: Path, *, is_one_of_several: bool) -> Iterator[None]:
    """Around the work of a process, which may be killed, or meet that another is gone.

    Raises:
        LostProcessError: in place of what a library raises then.
    """
    if not is_one_of_several:
        yield
        return
    witness = _start_witness(output_dir)
    try:
        yield
    except RuntimeError as error:
        if not _OF_LOST_PROCESS.search(str(error)):
            raise
        lost = f"A process of this run was lost, and this one cannot go on without it. {_how_to_go_on(output_dir)}"
        raise LostProcessError(lost) from error
    finally:
        with suppress(BrokenPipeError):
            witness.communicate(_FAREWELL)


def tell(text: str) -> int:
    """Say on stderr what ended the process; returns its exit code."""
    print(with_indented_lines(outgoing(f"error: {text}")), file=sys.stderr, flush=True)
    return LOST_PROCESS


def end_after_lost_process(error: LostProcessError) -> NoReturn:
    """Say it and end at once: at a regular end, libraries would wait for the process that is gone."""
    exit_code = tell(str(error))
    sys.stdout.flush()
    os._exit(exit_code)


def _start_witness(output_dir: Path) -> "subprocess.Popen[bytes]":
    """In a session of its own, so that what is sent to all processes of a terminal does not reach it, and without what
    launchers know their processes by."""
    return subprocess.Popen(
        [sys.executable, "-m", "shared.run.lost_process", str(output_dir.absolute())],
        cwd=_ROOT,
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def _how_to_go_on(output_dir: Path) -> str:
    checkpoints = checkpoints_in(output_dir)
    where = f"goes on from {checkpoints[-1].name}" if checkpoints else "starts afresh, for there is no checkpoint yet"
    return f"Start the same command again on all hosts, with --resume_from_checkpoint latest: it {where}."


def _main(output_dir: Path) -> None:
    if sys.stdin.buffer.read() != _FAREWELL:
        tell(
            "This process of the run was killed, or was ended by a library (whose words then stand above), as happens "
            f"when another one is lost. {_how_to_go_on(output_dir)}"
        )


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
