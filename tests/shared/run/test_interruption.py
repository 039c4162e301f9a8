"""Signals, sent for real to a process that runs a loop of steps, and pipes that are closed under one."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.run.interruption import Interruption, forgiving_output

PROJECT = Path(__file__).resolve().parents[3]

LOOP = """
import signal, sys, time
from shared.run.interruption import Interruption
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite itself may run under nohup, whose programs ignore it
with Interruption() as interruption:
    print("stepping", flush=True)
    while interruption.requested is None:
        time.sleep(0.01)
    print(interruption.requested.name, flush=True)
    sys.stdin.readline()  # the save, which lasts as long as the test wants
    print("saved", flush=True)
print("left", flush=True)
sys.exit(interruption.exit_code)
"""


@contextmanager
def running_loop() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "stepping\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(("sent", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)])
def test_the_first_signal_lets_the_run_save_and_end(sent: signal.Signals, exit_code: int) -> None:
    with running_loop() as process:
        process.send_signal(sent)
        assert read_line(process) == sent.name
        output, errors = process.communicate("\n")
        assert (output, errors) == ("saved\nleft\n", "")
        assert process.returncode == exit_code


def test_further_sigterms_do_not_disturb_the_save() -> None:
    with running_loop() as process:
        process.send_signal(signal.SIGTERM)
        assert read_line(process) == "SIGTERM"
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate("\n")
        assert (output, errors, process.returncode) == ("saved\nleft\n", "", 0)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_saving_stops_at_once(first: signal.Signals) -> None:
    with running_loop() as process:
        process.send_signal(first)
        assert read_line(process) == first.name
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)  # without the line that would end the save
        output, errors = process.communicate()
        assert output == ""
        assert "KeyboardInterrupt" in errors
        assert process.returncode == -signal.SIGINT


def test_outside_the_loop_signals_mean_what_they_meant() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Interruption() as interruption:
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert interruption.requested is None
    assert interruption.exit_code == 0


def test_handlers_are_given_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="in the loop"), Interruption():
        raise RuntimeError("in the loop")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_lost_connection_is_not_heard_under_nohup() -> None:
    code = (
        "import os, signal\nfrom shared.run.interruption import Interruption\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with Interruption() as interruption:\n    os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(interruption.requested, signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=PROJECT) == "None True\n"


# --- output that nobody can read -------------------------------------------------------------------------------------

# As the entry points do: a log made before the loop, a progress bar, the log through the bar, and words at the end.
TALKER = """
import logging, os, sys, time
from pathlib import Path
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from shared.run.interruption import Interruption, forgiving_output
from shared.outgoing.messages import set_up_logging

def main():
    set_up_logging("talker")
    logger = logging.getLogger("talker")
    for line in range(LINES_BEFORE):
        logger.info("loading %d", line)
        time.sleep(0.01)
    bar = tqdm(total=1000, mininterval=0)
    with Interruption() as interruption, logging_redirect_tqdm():
        logger.info("in the loop")
        for step in range(LIMIT):
            bar.update()
            logger.info("step %d", step)
            print("printed", step)
            time.sleep(0.01)
            if interruption.requested is not None:
                break
        bar.close()
    logger.info("after the loop")
    reason = interruption.requested.name if interruption.requested else "nothing"
    Path(sys.argv[1]).write_text(f"saved, {reason}")
    return interruption.exit_code

with forgiving_output():
    code = main()
sys.exit(code)
"""


def talker(report: Path, *, before: int = 0, limit: int = 2000) -> list[str]:
    code = TALKER.replace("LINES_BEFORE", str(before)).replace("LIMIT", str(limit))
    return [sys.executable, "-c", code, str(report)]


@pytest.mark.parametrize("redirection", ["2>&1 | head -3", "2>&1 >/dev/null | head -1", "2>/dev/null | head -1"])
def test_a_closed_pipe_asks_a_run_to_save(tmp_path: Path, redirection: str) -> None:
    """In bash, as people do it. What is left over must not be an error of the interpreter's end either."""
    report = tmp_path / "report"
    script = f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *talker(report)], cwd=PROJECT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done
    assert "BrokenPipe" not in done.stdout + done.stderr
    assert report.read_text() == "saved, SIGPIPE"


def test_a_pipe_that_closes_while_loading_ends_the_process_quietly(tmp_path: Path) -> None:
    report = tmp_path / "report"
    script = '"$@" 2>&1 | head -2; exit ${PIPESTATUS[0]}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *talker(report, before=10**6)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2
    assert not report.exists()


@pytest.mark.parametrize("redirection", [">/dev/full 2>&1", "2>/dev/full", ">/dev/full"])
def test_a_log_on_a_full_disk_ends_nothing(tmp_path: Path, redirection: str) -> None:
    report = tmp_path / "report"
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *talker(report, limit=100)], cwd=PROJECT, timeout=100
    )
    assert done.returncode == 0
    assert report.read_text() == "saved, nothing"


def test_a_terminal_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    """What is left of a job in the background when its window is closed."""
    report = tmp_path / "report"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(talker(report, limit=200), cwd=PROJECT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    assert process.wait(timeout=100) == 0
    assert report.read_text() == "saved, nothing"


def test_help_may_be_cut_short() -> None:
    for entry_point in ("train_flax.py", "train_torch.py"):
        script = f"{sys.executable} {entry_point} --help | head -1; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", script], cwd=PROJECT, capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == 1


def test_the_streams_are_given_back() -> None:
    before = sys.stdout, sys.stderr
    with forgiving_output():
        assert sys.stdout is not before[0]
        assert sys.stderr.encoding == before[1].encoding
    with pytest.raises(RuntimeError, match="in the run"), forgiving_output():
        raise RuntimeError("in the run")
    assert (sys.stdout, sys.stderr) == before
