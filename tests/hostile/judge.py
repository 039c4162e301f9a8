"""From what was seen of a case to its outcome."""

import os
import re
import signal
from collections.abc import Iterator

from tests.hostile.case import Case
from tests.hostile.outcome import Outcome, Result, Sign, worst
from tests.hostile.signs import signs_in_text
from tests.hostile.watched import MIB, Bounds, Observation

_MOST_OUTPUT = 1 * MIB  # a terminal's worth a thousand times over
_MOST_OF_A_MESSAGE = 8000  # characters: an explained mistake that lists a few differences has some hundred
_TRACEBACK = re.compile(r"Traceback \(most recent call last\)|Exception ignored in|Fatal Python error")
_SENTENCE = re.compile(r"(?m)^(?:[\w. -]+: )?error: .*\w")
_FRAME = re.compile(r'File "([^"]+)", line (\d+),? in (\S+)')
_OURS = re.compile(r"^(?!.*site-packages).*/(?=(?:shared|flax_trainer|torch_trainer)/)")


def judged(kind: str, case: Case, seen: Observation, bounds: Bounds) -> Result:
    """The worst of what it shows."""
    signs = list(_signs(case, seen, bounds))
    counts = worst(signs)
    what = next((entry["what"] for entry in seen.status if entry["stage"] == "built"), "")
    return Result(
        kind=kind,
        seed=case.seed,
        number=case.number,
        outcome=counts.outcome,
        reason=counts.reason,
        what=what,
        seconds=round(seen.seconds, 3),
        peak_mib=round(seen.peak_mib),
        signs=[f"{sign.outcome}: {sign.reason}" for sign in signs],
    )


def _signs(case: Case, seen: Observation, bounds: Bounds) -> Iterator[Sign]:
    stages = {entry["stage"] for entry in seen.status}
    if "built" not in stages:
        yield Sign(Outcome.BROKEN, f"building it failed: {_last_line(seen.output)}")
        return
    yield from _signs_of_execution(case, seen)
    for entry in seen.status:
        if entry["stage"] == "opened a private file":
            yield Sign(Outcome.LEAKED, f"it opened {entry['path']}")
    yield from signs_in_text(case, seen.output, "the output")
    for entry in seen.status:
        if entry["stage"] == "inspected":
            yield Sign(Outcome(entry["outcome"]), entry["reason"])
    if seen.over_memory:
        yield Sign(Outcome.UNBOUNDED, f"{seen.peak_mib:,.0f} MiB of memory{_where_it_was(seen)}")
    if seen.over_time:
        yield Sign(Outcome.ENDLESS, f"no end within {bounds.seconds:g} s{_where_it_was(seen)}")
    if seen.output_bytes > _MOST_OUTPUT:
        yield Sign(Outcome.UNBOUNDED, f"{seen.output_bytes:,} bytes of output")
    if not (seen.over_memory or seen.over_time):
        yield _ending(seen, stages)


def _signs_of_execution(case: Case, seen: Observation) -> Iterator[Sign]:
    if os.path.lexists(case.executed):
        yield Sign(Outcome.EXECUTED, "the input's code ran and left its file")
    for entry in seen.status:
        if entry["stage"] == "started a program":
            yield Sign(Outcome.EXECUTED, f"{entry['event']} {entry['arguments']}")


def _ending(seen: Observation, stages: set[str]) -> Sign:
    if not seen.ended_itself:
        number = os.WTERMSIG(seen.exit_status)
        return Sign(Outcome.CRASHED, f"ended by {signal.Signals(number).name}: {_last_line(seen.output)}")
    if "ended" not in stages:
        return Sign(Outcome.CRASHED, f"the process left with code {os.WEXITSTATUS(seen.exit_status)} by itself")
    if "complete" not in stages:
        return Sign(Outcome.BROKEN, f"its results could not be inspected: {_last_line(seen.output)}")
    if _TRACEBACK.search(seen.output):
        memory = re.search(r"(?m)^(?:\w+\.)*_?(?:ArrayMemoryError|MemoryError)\b.*", seen.output)
        if memory:
            return Sign(Outcome.UNBOUNDED, f"{memory[0][:200]}{_innermost_frame(seen.output)}")
        return Sign(Outcome.TRACEBACK, f"{_last_line(seen.output)}{_innermost_frame(seen.output)}")
    return _explained(seen)


def _explained(seen: Observation) -> Sign:
    code = next(entry["code"] for entry in seen.status if entry["stage"] == "ended")
    built = next(entry for entry in seen.status if entry["stage"] == "built")
    if code in built["good_codes"]:
        return Sign(Outcome.HARMLESS, "it worked")
    if built["is_honest"]:
        return Sign(Outcome.BROKEN, f"honest files were refused: {_last_line(seen.output)}")
    sentence = _SENTENCE.search(seen.output)
    if code != 2 or sentence is None:
        return Sign(Outcome.TRACEBACK, f"exit code {code} without a sentence: {_last_line(seen.output)}")
    message = seen.output[sentence.start() :]
    if len(message) > _MOST_OF_A_MESSAGE:
        return Sign(Outcome.UNBOUNDED, f"a message of {len(message):,} characters: {message[:200]!a}")
    return Sign(Outcome.HANDLED, ascii(message.strip()[:400])[1:-1])


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return ascii(lines[-1][:300])[1:-1] if lines else "(no output)"


def _innermost_frame(output: str) -> str:
    """Where in this project the last traceback was: its deepest frame there."""
    return next((_named(*frame) for frame in reversed(_FRAME.findall(output)) if _OURS.search(frame[0])), "")


def _where_it_was(seen: Observation) -> str:
    """When it had to be ended: the stacks of its threads, each from the inside out."""
    return next((_named(*frame) for frame in _FRAME.findall(seen.stacks) if _OURS.search(frame[0])), "")


def _named(path: str, line: str, function: str) -> str:
    return f" [{_OURS.split(path)[-1]}:{line} {function}]"
