"""The figures of a run as JSON Lines: one object per logged step, readable while the run goes on."""

import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from shared.outgoing.atomic_files import append_whole, write_atomically
from shared.untrusted import MIB, open_file, parse_json, shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

_MOST_WAITING = 100_000  # lines of some 300 bytes: a day of a disk that is full, in some 40 MB of memory
_WRITTEN_AT_ONCE = 1000  # of the lines that wait: a disk that stays full costs each step one attempt of 300 kB

_LONGEST_LINE = MIB  # the longest of ours have 500 bytes
LARGEST_METRICS = 512 * MIB  # a million steps and more, each logged, of which no known training has had half
_MOST_ENTRIES = 2_000_000
_LARGEST_STEP = 2**53  # up to there every whole number is a float


class MetricsFile:
    """Appends `{"step": …, name: value, …}` to a file, one line per call, as soon as it is logged.

    JSON has no NaN or infinity: such a value is written as null.

    Figures only watch a training. Where the file cannot be written, the log says so once, the lines are kept in memory
    and every further call tries again: a file that can be written again has all of them, in order.
    """

    def __init__(self, path: Path):
        """Continues what is there.

        Raises:
            OSError: the file cannot be written.
            UserError: what is there is no regular file, or a link to one, whose lines would become the run's own.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise UserError(f"{shown(path)} is a link: expected the run's own file. Delete it, or put the file there.")
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._failed = False
        self._descriptor: int | None = None
        # A run that was killed in the middle of a line must not have its next line glued to it.
        self._replace_lines(list(_complete_lines(path)))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        entry = {"step": step} | {name: _json_number(value) for name, value in metrics.items()}
        self._waiting.append(json.dumps(entry, allow_nan=False).encode() + b"\n")
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._write_waiting()

    def images(self, tag: str, images: Sequence[tuple[str, np.ndarray]], step: int) -> None:
        """Nothing: images are kept as files of their own."""

    def truncate_after(self, step: int) -> None:
        """Raises OSError where the file cannot be written, UserError where it is damaged."""
        lines = enumerate(_complete_lines(self._path), 1) if step >= 0 else ()
        kept = [line for number, line in lines if self._step(line, number) <= step]
        self._release()
        self._replace_lines(kept)

    def close(self) -> None:
        self._write_waiting()
        if self._waiting or self._lost:
            logger.warning("%d entries are missing in %s", len(self._waiting) + self._lost, self._path)
        self._release()

    def _step(self, line: bytes, number: int) -> float:
        return _entry(line, f"{self._path}, line {number}")["step"]

    def _replace_lines(self, lines: Sequence[bytes]) -> None:
        write_atomically(self._path, lambda temporary: temporary.write_bytes(b"".join(lines)))
        self._end = sum(map(len, lines))
        self._descriptor = self._open()

    def _open(self) -> int:
        # The file may be gone by now, and whatever has taken its place is not followed.
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)

    def _release(self) -> None:
        """Let go of the file, whose descriptor may be of no use any more."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.close(descriptor)
        except OSError as error:  # some network file systems tell only now
            self._say_failure(error)

    def _write_waiting(self) -> None:
        waited = len(self._waiting)
        try:
            while self._waiting:
                count = min(len(self._waiting), _WRITTEN_AT_ONCE)
                self._append(b"".join(self._waiting[index] for index in range(count)))
                for _ in range(count):
                    self._waiting.popleft()
        except OSError as error:
            self._say_failure(error)
            self._release()
            return
        if self._failed:
            lost = f"; {self._lost} were too many to keep and are lost" if self._lost else ""
            logger.info("%s is written again, with the %d lines that waited%s", self._path, waited, lost)
            self._failed = False

    def _append(self, lines: bytes) -> None:
        """Write whole lines or none."""
        if self._descriptor is None:
            self._descriptor = self._open()
            self._end = min(self._end, os.fstat(self._descriptor).st_size)
            os.ftruncate(self._descriptor, self._end)
        self._end = append_whole(self._descriptor, lines, self._end)

    def _say_failure(self, error: OSError) -> None:
        if not self._failed:
            logger.warning(
                "%s cannot be written (%s). The training goes on; its figures are kept in memory and written as soon "
                "as that works again",
                *(self._path, error.strerror or error),
            )
        self._failed = True


def read_metrics(run_directory: Path) -> list[dict[str, float]]:
    """Every complete entry of a run's metrics.jsonl, in order; none where there is no such file.

    Raises:
        UserError: it cannot be read, is larger than any run's, or a line of it is damaged.
    """
    path = run_directory / METRICS_FILE
    entries: list[dict[str, float]] = []
    for number, line in enumerate(_complete_lines(path), 1):
        if number > _MOST_ENTRIES:
            raise UserError(f"{shown(path)} has more than {_MOST_ENTRIES} lines, which no honest run has.")
        entries.append(_entry(line, f"{path}, line {number}"))
    return entries


def _entry(line: bytes, where: str) -> dict[str, float]:
    """One line: an object of numbers and null, with a step."""
    fix = "Delete that line, or run the training again."
    entry: dict[str, float] = parse_json(line, dict[str, float | None], where=where, fix=fix)
    step = entry.get("step")
    if step is None or not 0 <= step <= _LARGEST_STEP or step != int(step):
        raise UserError(f"{shown(where)} has no step that is a whole number, 0 or more. {fix}")
    entry["step"] = int(step)
    return entry


def _complete_lines(path: Path) -> Iterator[bytes]:
    """The lines that end with a line break: the last one of a killed run may not."""
    if not os.path.exists(path):
        return
    size = 0
    with open_file(path) as file:
        while line := file.readline(_LONGEST_LINE + 1):
            size += len(line)
            if len(line) > _LONGEST_LINE or size > LARGEST_METRICS:
                raise UserError(f"{shown(path)} has lines or a size that no honest run's metrics have.")
            if line.endswith(b"\n"):
                yield line


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
