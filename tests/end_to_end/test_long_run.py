"""The criterion of `tests.end_to_end.long_run`: processes that leak on purpose are found, others are not."""

from pathlib import Path

import pytest

from tests.end_to_end import long_run
from tests.end_to_end.long_run import Sample, verdict, watched

_STAND_IN = """
import json, sys, threading, time
run, leak = sys.argv[1:]
kept = []
with open(f"{run}/metrics.jsonl", "a") as file:
    for step in range(1, 1001):
        if leak == "memory":
            kept.append(b"x" * 10_000)
        if leak == "files" and step % 50 == 0:
            kept.append(open("/dev/null"))
        if leak == "threads" and step % 50 == 0:
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        print(json.dumps({"step": step}), file=file, flush=True)
        time.sleep(0.001)
"""


@pytest.mark.parametrize("leak", ["nothing", "memory", "files", "threads"])
def test_what_leaks_is_found(leak: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_run, "_SECONDS_BETWEEN_SAMPLES", 0.01)
    found = verdict(watched(["-c", _STAND_IN, str(tmp_path), leak], tmp_path, tmp_path / "output.txt")).faults
    assert len(found) == (leak != "nothing")
    for fault in found:
        assert leak in fault


def test_growth_is_that_of_the_second_half() -> None:
    """A run that fills its caches first, and one that loses two MB in 1,000 steps beside peaks of saving."""
    settling = [Sample(step, 100 + min(step, 400) / 4, 10, 4) for step in range(1, 1001)]
    assert verdict(settling).growth == 0
    leaking = [Sample(step, 100 + 0.002 * step + 500 * (step % 50 == 0), 10, 4) for step in range(1, 1001)]
    assert verdict(leaking).growth == pytest.approx(2, rel=0.01)
    assert [fault.partition(" MB")[0] for fault in verdict(leaking).faults] == ["2.00"]
    assert [fault.partition(" MB")[0] for fault in verdict(leaking, checkpoints=1.4).faults] == ["2.00"]
    assert not verdict(leaking, checkpoints=1.6).faults


def test_a_run_that_fails_is_no_flat_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3: .*no such thing"):
        watched(["-c", "import sys; print('no such thing'); sys.exit(3)"], tmp_path, tmp_path / "output.txt")
