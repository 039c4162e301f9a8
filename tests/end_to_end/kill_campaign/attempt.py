"""One start of a run, what is done to it, and how it ends."""

import re
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.end_to_end.kill_campaign import places
from tests.end_to_end.kill_campaign.faults import Fault, Means
from tests.end_to_end.kill_campaign.hub import Hub
from tests.end_to_end.kill_campaign.judging import resumable_step
from tests.end_to_end.kill_campaign.kinds import LAUNCHER, Kind, Run
from tests.end_to_end.kill_campaign.moments import Moment, Watch, last_step
from tests.end_to_end.kill_campaign.outcome import Outcome

CLOCK = Path(__file__).parent / "stopped_clock"
_LONGEST = 400.0  # seconds that a start may take on a busy machine
_SECONDS_TO_SAVE = 120.0
_LONGEST_SILENCE = 120.0  # seconds: on a busy machine compiling takes as long
_LONGEST_SILENCE_OF_SEVERAL = 50.0  # of which one may wait for another that is gone
_SECONDS_OF_SURVIVORS = 3.0  # then they are killed too, as by whatever manages the machines
_SIGNALS = {Means.KILL: signal.SIGKILL, Means.STOPPED_CLOCK: signal.SIGKILL, Means.STOP: signal.SIGTERM}
_BETWEEN_LOOKS, _UNTIL_IT_IS_THERE = 0.002, 0.05
_UNPROTECTED = (Moment.STARTING, Moment.RESULT, Moment.UPLOADING)  # nothing is there to be saved: SIGTERM just ends it
_TRACEBACK = re.compile(r"Traceback \(most recent call last\)|Fatal Python error")


@dataclass(frozen=True)
class Place:
    """Where a run lives: its folder, the disk that it has to itself if any, the Hub, and where its output goes."""

    kind: Kind
    folder: Path
    disk: places.SmallDisk | None
    hub: Hub
    work: Path
    command: list[str]
    environment: Mapping[str, str]
    steps: int
    checkpoint_bytes: int


def disturbed(place: Place, fault: Fault, outcome: Outcome) -> None:
    """Start the command, disturb it, see it end; `outcome` is filled in."""
    began = time.monotonic()
    before = resumable_step(place.folder)
    output = place.work / f"output-{time.time_ns()}.txt"
    environment = dict(place.environment)
    if fault.means is Means.STOPPED_CLOCK:
        environment |= {"PYTHONPATH": str(CLOCK), "STOPPED_CLOCK": str(time.time() - fault.back)}
    watch = Watch(place.folder, place.kind, before, place.steps, place.hub.is_receiving)
    with ExitStack() as closing:
        if fault.means is Means.FULL_DISK:
            assert place.disk is not None
            place.disk.leave_room(fault.share, place.checkpoint_bytes)
            closing.callback(place.disk.make_room)
        run = place.kind.start(place.command, environment, output)
        closing.callback(run.kill)
        if fault.means is Means.FULL_DISK:
            _wait_for_its_end(run, output, outcome)
        elif fault.means is Means.READ_ONLY:
            outcome.delivered = _wait_for(run, watch, fault)
            if outcome.delivered:
                closing.enter_context(places.read_only(place.folder))
            _resume(run)
            _wait_for_its_end(run, output, outcome)
        else:
            _signalled(run, watch, fault, output, outcome)
    outcome.logged = last_step(place.folder)
    text = output.read_text(errors="replace")
    _judge(place, fault, outcome, before, text)
    if not outcome.failures:
        output.unlink()
    outcome.seconds = time.monotonic() - began


def _wait_for(run: Run, watch: Watch, fault: Fault) -> bool:
    """Stop the processes at the moment, and see that they are there; False where the run ends first."""
    deadline, delay = time.monotonic() + _LONGEST, fault.delay
    while time.monotonic() < deadline and not run.has_ended:
        if run.member(fault.victim) is None:
            time.sleep(_UNTIL_IT_IS_THERE)
            continue
        if not watch.is_at(fault.moment, fault.steps):
            time.sleep(_BETWEEN_LOOKS)
            continue
        time.sleep(delay)
        delay = 0.0
        for process in run.everyone():
            _send(process, signal.SIGSTOP)
        is_there = fault.moment is Moment.SAVED or watch.is_at(fault.moment, fault.steps)
        if is_there and run.member(fault.victim) is not None:
            return True
        _resume(run)
    return False


def _signalled(run: Run, watch: Watch, fault: Fault, output: Path, outcome: Outcome) -> None:
    if not _wait_for(run, watch, fault):
        outcome.delivered = False
        _wait_for_its_end(run, output, outcome)
        return
    victim = run.member(fault.victim)
    assert victim is not None
    _send(victim, _SIGNALS[fault.means])
    _resume(run)
    if fault.means is Means.STOP:
        codes = run.wait(_SECONDS_TO_SAVE)
        if codes is None:
            outcome.failures.append(f"something still runs {_SECONDS_TO_SAVE:.0f} s after SIGTERM")
    else:
        codes = run.wait(_SECONDS_OF_SURVIVORS)
        if codes is None:
            outcome.notes.append("whoever had survived was killed too")
    run.kill()
    outcome.exit_codes = codes or []


def _wait_for_its_end(run: Run, output: Path, outcome: Outcome) -> None:
    """Of several processes, one that cannot write leaves the others waiting for it, for as long as libraries do."""
    said, since = -1, time.monotonic()
    while not run.has_ended:
        if output.stat().st_size != said:
            said, since = output.stat().st_size, time.monotonic()
        longest = _LONGEST_SILENCE if len(run.everyone()) == 1 else _LONGEST_SILENCE_OF_SEVERAL
        if time.monotonic() - since > longest:
            outcome.notes.append(f"nothing happened for {longest:.0f} s, and all were killed")
            run.kill()
        time.sleep(0.05)
    codes = run.wait(_SECONDS_OF_SURVIVORS)
    if codes is None:
        outcome.notes.append("one process ended, and the others were killed")
    outcome.exit_codes = codes or []


def _judge(place: Place, fault: Fault, outcome: Outcome, before: int, text: str) -> None:
    try:
        outcome.resumable = resumable_step(place.folder)
    except ValueError as error:
        outcome.failures.append(str(error))
        return
    if outcome.resumable < before:
        outcome.failures.append(f"it went on from step {before}, and the next start would from {outcome.resumable}")
    if before and "of which" in text and f"of which {before} are done" not in text:
        outcome.failures.append(f"it did not go on from step {before}")
    if not outcome.delivered:
        return
    if fault.means is Means.STOP:
        outcome.failures += _faults_of_stopping(fault, outcome, text)
    if fault.means in (Means.FULL_DISK, Means.READ_ONLY):
        outcome.failures += _faults_of_a_bad_disk(place.kind, outcome, text)
    if fault.means is Means.STOPPED_CLOCK and "cannot be written" in text:
        outcome.failures.append(f"a stopped clock keeps something from being written: {_end_of(text)}")


def _faults_of_stopping(fault: Fault, outcome: Outcome, text: str) -> list[str]:
    if fault.moment in _UNPROTECTED:
        return []
    found = []
    if any(outcome.exit_codes) and fault.victim != LAUNCHER:
        found.append(f"exit codes {outcome.exit_codes} after SIGTERM: {_end_of(text)}")
    if outcome.repeated or "continue with --resume_from_checkpoint latest" not in text:
        found.append(f"SIGTERM did not save the last step: {_end_of(text)}")
    return found


def _faults_of_a_bad_disk(kind: Kind, outcome: Outcome, text: str) -> list[str]:
    """It is told in a sentence, or costs a picture or a line that is there later. A launcher adds its own traceback."""
    found = []
    if outcome.notes and kind.processes == 1:
        found.append(f"it stands still: {_end_of(text)}")
    if _TRACEBACK.search(text) and kind.processes == 1:
        found.append(f"a traceback: {_end_of(text)}")
    if any(outcome.exit_codes) and not outcome.notes and "error: " not in text:
        found.append(f"an end that nothing explains: {_end_of(text)}")
    return found


def _resume(run: Run) -> None:
    for process in run.everyone():
        _send(process, signal.SIGCONT)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _end_of(text: str) -> str:
    return text[-1500:]
