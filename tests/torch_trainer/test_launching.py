"""What becomes of a launcher of several processes that is told to stop, as `docs/pytorch.md` says; with a stand-in."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, page
from tests.end_to_end.support.running import CONFIGS, free_port

_STAND_IN = """
import os, signal, sys, threading, time
from pathlib import Path

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
asked = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: asked.set())
(folder / f"started-{os.environ['RANK']}").touch()
while not asked.wait(0.1):
    pass
time.sleep(seconds)  # saving
(folder / f"saved-{os.environ['RANK']}").touch()
"""
_LAUNCH = f"{sys.executable} -m accelerate.commands.launch --main_process_port {{port}} --config_file"
_SAVED = {"saved-0", "saved-1"}


def lines_of_the_page() -> str:
    (block,) = [block for block in page(ROOT / "docs" / "pytorch.md").blocks("sh") if "trap" in block]
    return block


def stopped(script: str, folder: Path, seconds: float, **environment: str) -> tuple[int, set[str]]:
    """The exit code of a script with a launcher after SIGTERM, and what was saved by a worker that takes so long."""
    worker = folder / "worker.py"
    worker.write_text(_STAND_IN)
    config = "torch_trainer/accelerate_configs/multi_gpu.yaml"
    assert config in script
    script = script.replace("accelerate launch --config_file", _LAUNCH.format(port=free_port()))
    script = script.replace(config, str(CONFIGS / "multi_cpu.yaml"))
    script = script.replace("train_torch.py …", f"{worker} {folder} {seconds}")
    process = subprocess.Popen(
        ["sh", "-c", script], env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("started-*"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        return process.wait(120), {path.name for path in folder.glob("saved-*")}
    finally:
        process.kill()


@pytest.mark.parametrize(("seconds", "saved"), [("60", _SAVED), ("1", set())])
def test_the_launcher_fails_and_waits_as_long_as_it_is_told(tmp_path: Path, seconds: str, saved: set[str]) -> None:
    (command, *_) = lines_of_the_page().split(" & ")
    code, found = stopped(f"exec {command}", tmp_path, 4, TORCH_ELASTIC_SHUTDOWN_TIMEOUT=seconds)
    assert code not in (0, -signal.SIGTERM)
    assert found == saved


def test_where_only_its_processes_are_told_it_succeeds(tmp_path: Path) -> None:
    """However long they take."""
    assert stopped(lines_of_the_page(), tmp_path, 4, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1") == (0, _SAVED)
