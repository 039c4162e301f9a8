"""`python3 -m shared.check_run RUN …`: which checkpoints of a run are what was saved, and where it would go on.

Reads every file of every checkpoint, and changes nothing.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from shared.checkpoints.completing import UNFINISHED, WRITTEN_BY_ORBAX, replaced_in
from shared.checkpoints.digests import examine
from shared.checkpoints.orbax_files import is_orbax_checkpoint
from shared.checkpoints.policy import (
    ABANDONED,
    CHECKPOINT_PREFIX,
    check_no_links_out,
    checkpoint_step,
    checkpoints_in,
    entries,
    is_checkpoint,
)
from shared.checkpoints.portable import STATE_FILE
from shared.checkpoints.retention import is_timed
from shared.outgoing.messages import explain
from shared.run.folder import WEIGHTS_FILE, finished_steps
from shared.run.interruption import INTERRUPTED, forgiving_output
from shared.untrusted import shown
from shared.user_errors import UserError


class Finding(NamedTuple):
    """A checkpoint, or what is left of one. `resumable` is its name for the next run, None where that passes it over.

    `is_damaged` is not said of what no run would take for a checkpoint.
    """

    path: Path
    step: str
    verdict: str
    resumable: str | None = None
    is_damaged: bool = False


def main(words: list[str]) -> int:
    """0: nothing is damaged; 1: something is; 2: a folder cannot be read, or is not there."""
    parser = argparse.ArgumentParser(
        prog="python3 -m shared.check_run",
        description="Read the checkpoints of a run, and say which are what was saved and where it would go on from.",
        epilog="Exit code: 0 nothing is damaged, 1 something is, 2 there is no such folder.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --output_dir of a run")
    runs = [Path(run) for run in parser.parse_args(words).runs]
    try:
        for run in runs:
            _check_is_run(run)
        return max([_report(run) for run in runs])
    except ValueError as error:
        return explain(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _check_is_run(run: Path) -> None:
    if not os.path.isdir(run):
        raise UserError(f"{shown(run)} is not a folder. Give the --output_dir of a run.")
    if is_checkpoint(run):
        raise UserError(f"{shown(run)} is a checkpoint. Give the folder that it is in.")


def _report(run: Path) -> int:
    """Print what there is to say of a run, a line as soon as it is known; returns its exit code."""
    print(shown(run))
    found: list[Finding] = []
    for finding in _findings(run):
        if not os.path.lexists(finding.path):  # a run has deleted it meanwhile
            continue
        size = f"{_size(finding.path) / 1e6:,.1f} MB"
        columns = (f"{shown(finding.path.name):<24}", f"step {finding.step:<8}", f"{_backend(finding.path):<7}")
        print(" ", *columns, f"{size:>12}", f" {finding.verdict}", flush=True)
        found.append(finding)
    if not found:
        print("  no checkpoints")
    result, result_is_damaged = _result(run)
    print(f"  result: {result}")
    next_run, is_refused = _next_run(run, found)
    print(f"  --resume_from_checkpoint latest {next_run}")
    return 1 if result_is_damaged or is_refused or any(finding.is_damaged for finding in found) else 0


def _findings(run: Path) -> Iterator[Finding]:
    for checkpoint in checkpoints_in(run):
        yield _examined(checkpoint, checkpoint.name)
    for replaced, place in replaced_in(run):
        if os.path.lexists(place):
            yield Finding(replaced, _step_of(replaced), "incomplete: another one of this step has taken its place")
        else:
            yield _examined(replaced, place.name)
    for path in sorted(entries(run)):
        if path.name.startswith(CHECKPOINT_PREFIX):
            if path.name.endswith(UNFINISHED) or WRITTEN_BY_ORBAX in path.name:
                yield Finding(path, _step_of(path), "incomplete: a run is writing or deleting it, or was killed then")
            elif path.name.endswith(ABANDONED):
                yield Finding(path, _step_of(path), "set aside by a run that went back to an earlier step")


def _examined(checkpoint: Path, name: str) -> Finding:
    verdict = examine(checkpoint)
    said = str(verdict)
    if is_timed(checkpoint):
        said += " (of --checkpointing_seconds: a run deletes it when a newer one is complete)"
    if checkpoint.name != name:
        said += f" (a killed run was replacing it; the next one calls it {name} again)"
    return Finding(checkpoint, _step_of(checkpoint), said, None if verdict.damage else name, bool(verdict.damage))


def _step_of(path: Path) -> str:
    """Of names that nobody has checked."""
    return shown(path.name.removeprefix(CHECKPOINT_PREFIX).partition(".")[0])


def _next_run(run: Path, found: list[Finding]) -> tuple[str, bool]:
    """What it would do, and whether it would refuse to."""
    try:
        check_no_links_out(entries(run))
    except UserError as error:
        return f"is refused: {error}", True
    resumable = [run / finding.resumable for finding in found if finding.resumable is not None]
    if resumable:
        newest = max(resumable, key=checkpoint_step)
        return f"goes on from {newest.name}, after step {checkpoint_step(newest)}", False
    if any(finding.is_damaged for finding in found):
        return "is refused: all checkpoints are damaged", True
    return "starts afresh", False


def _backend(path: Path) -> str:
    if is_orbax_checkpoint(path):
        return "flax"
    return "torch" if os.path.isfile(path / STATE_FILE) else "unknown"


def _size(folder: Path) -> int:
    total = 0
    for path in (Path(parent, name) for parent, _, names in os.walk(folder) for name in names):
        with suppress(OSError):  # a run is deleting it
            total += path.lstat().st_size
    return total


def _result(run: Path) -> tuple[str, bool]:
    """What there is of it, and whether that is damaged."""
    has_weights = os.path.isfile(run / WEIGHTS_FILE)
    try:
        steps = finished_steps(run)
    except UserError as error:
        return str(error), True
    if steps is not None:
        return f"a finished run of {steps} steps" + ("" if has_weights else f"; {WEIGHTS_FILE} is not there"), False
    return (f"{WEIGHTS_FILE} without the report of a finished run" if has_weights else "none yet"), False


if __name__ == "__main__":
    with forgiving_output():
        sys.exit(main(sys.argv[1:]))
