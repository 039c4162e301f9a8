"""Many cases: divided among the warm processes of every side, and their results collected."""

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hostile.kinds import SIDES, kind_of
from tests.hostile.outcome import Outcome, Result

PROJECT = Path(__file__).resolve().parents[2]
_MANY = 400  # cases of a side, from which on a second warm process of it pays
_WITHOUT_ORIGINALS = {"shared", "proofs"}
_PATIENCE = 3.0  # times the bound, when a case that passed it has a second go


@dataclass(frozen=True)
class Campaign:
    """What is to be run.

    Attributes:
        numbers: the cases.
        seconds: that a case may take, from when it is built.
        mib: of resident memory that it may take.
        keep: where the folders of cases that fail are left.
    """

    seed: int
    numbers: Sequence[int]
    workers: int = 2
    seconds: float = 20.0
    mib: float = 3072.0
    keep: Path | None = None


def run(campaign: Campaign, report: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Run all of it; `report` is called with every result as it comes. The results are in the order of the numbers."""
    results: list[Result] = []
    lock = threading.Lock()

    def note(result: Result) -> None:
        with lock:
            results.append(result)
            report(result)

    with _work_folder(campaign.keep) as work, ThreadPoolExecutor(1) as making:
        originals = making.submit(_make_originals, work / "originals", _sides(campaign.numbers))
        jobs = _jobs(campaign)
        with ThreadPoolExecutor(campaign.workers) as workers:
            ends = [workers.submit(_work_off, campaign, jobs, work, originals, note) for _ in range(campaign.workers)]
            for end in ends:
                end.result()
        folder, before = originals.result()
        if _state(folder) != before:
            raise RuntimeError(
                f"The honest files in {folder} are no longer what they were: a case wrote through a link."
            )
    return sorted(results, key=lambda result: result.number)


@contextmanager
def _work_folder(keep: Path | None) -> Iterator[Path]:
    """Where cases happen: beside what is kept, so that it can be moved there."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="hostile-", dir=keep))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sides(numbers: Sequence[int]) -> set[str]:
    return {kind_of(number).side for number in numbers}


@dataclass(frozen=True)
class _Job:
    name: str
    side: str
    numbers: Sequence[int]


def _jobs(campaign: Campaign) -> "queue.SimpleQueue[_Job]":
    """The sides that wait for no originals come first."""
    jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
    for side in SIDES:
        numbers = [number for number in campaign.numbers if kind_of(number).side == side]
        parts = campaign.workers if len(numbers) > _MANY else 1
        for part in range(parts):
            if numbers[part::parts]:
                jobs.put(_Job(f"{side}-{part}", side, numbers[part::parts]))
    return jobs


_State = list[tuple[str, int, int]]


def _make_originals(folder: Path, sides: set[str]) -> tuple[Path, _State]:
    """The honest files of which models and checkpoints are mutated copies; not where no kind needs them."""
    if sides - _WITHOUT_ORIGINALS:
        command = [sys.executable, "-W", "ignore", "-m", "tests.hostile.originals", str(folder)]
        ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"The honest files could not be made:\n{ended.stderr[-3000:]}")
    return folder, _state(folder)


def _state(folder: Path) -> _State:
    """Of files that cases share with their originals."""
    status = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return [(str(path), value.st_size, value.st_mtime_ns) for path, value in status]


def _work_off(
    campaign: Campaign,
    jobs: "queue.SimpleQueue[_Job]",
    work: Path,
    originals: "Future[tuple[Path, _State]]",
    note: Callable[[Result], None],
) -> None:
    """One job after the other, until none is left."""
    while True:
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            return
        if job.side not in _WITHOUT_ORIGINALS:
            originals.result()
        with _Server(campaign, job, work) as server:
            for number in job.numbers:
                note(_result(campaign, server, number))


def _result(campaign: Campaign, server: "_Server", number: int) -> Result:
    """A case that seems endless is run again with more time: the machine may have been busy."""
    result = server.run(number, campaign.seconds)
    if result.outcome == Outcome.ENDLESS:
        return server.run(number, campaign.seconds * _PATIENCE)
    return result


class _Server:
    """The warm process of a side."""

    def __init__(self, campaign: Campaign, job: _Job, work: Path):
        command = [
            *(sys.executable, "-W", "ignore", "-m", "tests.hostile.server", job.side),
            *("--seed", str(campaign.seed), "--mib", str(campaign.mib)),
            *("--work", str(work / job.name), "--originals", str(work / "originals")),
            *(("--keep", str(campaign.keep.absolute())) if campaign.keep is not None else ()),
        ]
        self._log = (work / f"{job.name}.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
        )  # fmt: skip

    def __enter__(self) -> "_Server":
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        with self._process, self._log:  # which also closes its pipes
            self._process.kill()

    def run(self, number: int, seconds: float) -> Result:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"number": number, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return Result(**answer | {"outcome": Outcome(answer["outcome"])})

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"The warm process has ended:\n{self._log.read()[-3000:]}")
        return json.loads(line)
