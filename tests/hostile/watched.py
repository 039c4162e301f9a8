"""One case in a child of a warm process, within bounds of time and memory.

The child writes what it reaches to `status.jsonl`: that it was built, which programs it started, how it ended, what
inspecting its results showed. Its output goes to `output.txt`; where it was when it had to be ended, to `stacks.txt`.
"""

import faulthandler
import json
import os
import resource
import shutil
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from shared.outgoing.messages import explain
from tests.hostile.case import Case, open_case
from tests.hostile.outcome import Sign

MIB = 2**20
_SECONDS_TO_BUILD = 120.0
_LARGEST_FILE = 2 * 1024 * MIB  # that a case may write, so that it fills no disk
_VIRTUAL = 96 * 1024 * MIB  # beyond all files that a library maps: a last bound, where polling would come too late
_TELL_STACKS = signal.SIGUSR1
_SECONDS_TO_TELL = 0.2
_PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"}


class Attempt(NamedTuple):
    """What a kind does with a case that it has built.

    Attributes:
        what: what is hostile about it, in a few words.
        run: what a user's command does; returns its exit code, and raises what that would meet.
        inspect: what it left behind, looked at in the same process afterwards.
        good_codes: exit codes of a command that has worked.
        is_honest: nothing is hostile about it, so it has to work: whoever refuses everything handles nothing.
        private: folders of which it may not even open a file.
    """

    what: str
    run: Callable[[], int | None]
    inspect: Callable[[], Iterable[Sign]] = lambda: ()
    good_codes: frozenset[int] = frozenset({0})
    is_honest: bool = False
    private: tuple[Path, ...] = ()


Build = Callable[[Case], Attempt]


@dataclass(frozen=True)
class Bounds:
    """Of a case. `mib` is the peak of its resident memory."""

    seconds: float = 20.0
    mib: float = 3072.0


@dataclass(frozen=True)
class Observation:
    """What was seen of a case from outside. `status` is what its child wrote there."""

    status: list[dict[str, Any]]
    exit_status: int
    ended_itself: bool
    over_time: bool
    over_memory: bool
    seconds: float
    peak_mib: float
    output: str
    output_bytes: int
    stacks: str


def watch(build: Build, seed: int, number: int, folder: Path, bounds: Bounds) -> Observation:
    """Run a case in a forked child, in `folder`, which is made for it."""
    remove(folder)
    folder.mkdir(parents=True)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_child(build, seed, number, folder)
    over_time, over_memory, exit_status, peak_mib = _wait(child, folder, bounds)
    _end_group(child)
    return _observed(folder, exit_status, over_time, over_memory, time.monotonic() - started, peak_mib)


def remove(folder: Path) -> None:
    """Delete a case's folder, whatever it has made of its permissions."""

    def allow_and_retry(function: Callable[..., Any], path: str, _: BaseException) -> None:
        os.chmod(Path(path).parent, stat.S_IRWXU)
        if not Path(path).is_symlink():
            os.chmod(path, stat.S_IRWXU)
        function(path)

    if folder.exists():
        shutil.rmtree(folder, onerror=lambda function, path, error: allow_and_retry(function, path, error[1]))


# --- the parent ------------------------------------------------------------------------------------------------------


def _wait(child: int, folder: Path, bounds: Bounds) -> tuple[bool, bool, int, float]:
    """Poll until it has ended or passed a bound: (over time, over memory, exit status, peak in MiB)."""
    deadline = time.monotonic() + _SECONDS_TO_BUILD
    is_built, pause, peak_mib = False, 0.002, 0.0
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            peak_mib = max(peak_mib, usage.ru_maxrss / 1024)
            return False, peak_mib > bounds.mib, status, peak_mib
        peak_mib = max(peak_mib, _resident_mib(child))
        if not is_built and (folder / "built").exists():
            is_built, deadline = True, time.monotonic() + bounds.seconds
        over_time, over_memory = time.monotonic() > deadline, peak_mib > bounds.mib
        if over_time or over_memory:
            os.kill(child, _TELL_STACKS)
            time.sleep(_SECONDS_TO_TELL)
            os.kill(child, signal.SIGKILL)
            _, status, _ = os.wait4(child, 0)
            return over_time, over_memory, status, peak_mib
        time.sleep(pause)
        pause = min(pause * 1.3, 0.05)


def _resident_mib(process: int) -> float:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):  # it has just ended
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def _end_group(child: int) -> None:
    """Whatever it has started."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


def _observed(
    folder: Path, exit_status: int, over_time: bool, over_memory: bool, seconds: float, peak_mib: float
) -> Observation:
    output, status, stacks = (folder / name for name in ("output.txt", "status.jsonl", "stacks.txt"))
    content = b""
    if output.exists():
        with output.open("rb") as file:
            content = file.read(4 * MIB)
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return Observation(
        status=[json.loads(line) for line in lines],
        exit_status=exit_status,
        ended_itself=os.WIFEXITED(exit_status),
        over_time=over_time,
        over_memory=over_memory,
        seconds=seconds,
        peak_mib=peak_mib,
        output=content.decode("utf-8", errors="surrogateescape"),
        output_bytes=output.stat().st_size if output.exists() else 0,
        stacks=stacks.read_text(encoding="utf-8", errors="replace") if stacks.exists() else "",
    )


# --- the child -------------------------------------------------------------------------------------------------------


def _be_the_child(build: Build, seed: int, number: int, folder: Path) -> NoReturn:
    code = 3
    try:
        os.setsid()
        _take_output(folder)
        code = _run(build, open_case(seed, number, folder))
    except BaseException as error:  # nothing of the child may go on in the parent's code
        traceback.print_exception(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _take_output(folder: Path) -> None:
    """Its own file for what it prints, with the encoding of a terminal; a standard input that never says anything."""
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    silent, _ = os.pipe()  # the other end stays open
    os.dup2(silent, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (until the process ends)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(  # noqa: SIM115
        2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
    )


def _run(build: Build, case: Case) -> int:
    attempt = build(case)
    os.chdir(case.out)
    status = case.folder / "status.jsonl"
    _note(
        status,
        stage="built",
        what=attempt.what,
        good_codes=sorted(attempt.good_codes),
        is_honest=attempt.is_honest,
    )
    (case.folder / "built").touch()
    stacks = (case.folder / "stacks.txt").open("w", encoding="utf-8")  # open until the process ends
    faulthandler.enable(stacks)
    faulthandler.register(_TELL_STACKS, stacks)
    _set_limits()
    _note_events(status, attempt.private)
    code = _exit_code_of(attempt.run)
    sys.stdout.flush()
    _note(status, stage="ended", code=code)
    for sign in attempt.inspect():
        _note(status, stage="inspected", outcome=sign.outcome, reason=sign.reason)
    _note(status, stage="complete")
    return code


def _exit_code_of(run: Callable[[], int | None]) -> int:
    """As the entry points end."""
    try:
        return int(run() or 0)
    except ValueError as error:
        return explain(error)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 1
    except BaseException as error:
        traceback.print_exception(error)
        return 1


def _note(status: Path, **values: Any) -> None:
    with status.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def _set_limits() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + _VIRTUAL, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond it fails, as on a full disk


def _note_events(status: Path, private: tuple[Path, ...]) -> None:
    """Programs that are started, and private files that are opened, whatever becomes of it."""
    folders = tuple(f"{folder.resolve()}{os.sep}" for folder in private)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _PROGRAMS:
            _note(status, stage="started a program", event=event, arguments=ascii(arguments)[:300])
        elif event == "open" and isinstance(arguments[0], str) and folders:
            path = os.path.realpath(arguments[0])
            if path.startswith(folders):
                _note(status, stage="opened a private file", path=ascii(path))

    sys.addaudithook(hook)
