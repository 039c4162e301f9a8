"""Signals, sent for real to a process that runs a loop of steps."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.interruption import Interruption

LOOP = """
import sys, time
from shared.interruption import Interruption
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
        cwd=Path(__file__).resolve().parents[2],
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


@pytest.mark.parametrize(("sent", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
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
