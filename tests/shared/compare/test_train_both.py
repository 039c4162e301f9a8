"""Training with both backends: what their scripts are given, and what happens when one of them fails.

The scripts are stand-ins that write down how they were called; that the real ones can be compared is for
`tests/end_to_end`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.compare.command import TrainBoth
from shared.compare.train_both import train_both
from tests.end_to_end.support.running import PROJECT

_STAND_IN = """
import json, pathlib, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([pathlib.Path(__file__).name, *sys.argv[1:]]) + "\\n")
sys.exit({exit_code})
"""


def write_scripts(folder: Path, *, flax: int = 0, torch: int = 0) -> Path:
    for name, exit_code in (("flax", flax), ("torch", torch)):
        text = _STAND_IN.format(log=str(folder / "log"), exit_code=exit_code)
        (folder / f"train_{name}.py").write_text(text)
    return folder


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def test_both_get_the_same_flags_and_a_folder_each(tmp_path: Path) -> None:
    flags = ("--output_dir", "runs/{timestamp}", "--validation_prompt", "a circle", "--seed", "3")
    out = tmp_path / "out"
    runs = train_both(TrainBoth(flags, out), write_scripts(tmp_path))
    assert runs == (out / "flax", out / "torch")
    assert calls(tmp_path) == [
        ["train_flax.py", *flags, "--output_dir", str(out / "flax")],
        ["train_torch.py", *flags, "--output_dir", str(out / "torch")],
    ]


def test_the_second_is_not_started_when_the_first_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_flax.py ended with exit code 2"):
        train_both(TrainBoth((), tmp_path), write_scripts(tmp_path, flax=2))
    assert [call[0] for call in calls(tmp_path)] == ["train_flax.py"]


def test_a_failure_of_the_second_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_torch.py ended with exit code 1"):
        train_both(TrainBoth((), tmp_path), write_scripts(tmp_path, torch=1))


def test_an_interrupted_training_interrupts_the_command(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_both(TrainBoth((), tmp_path), write_scripts(tmp_path, flax=130))
    assert [call[0] for call in calls(tmp_path)] == ["train_flax.py"]


def test_ctrl_c_waits_for_the_trainer_to_save(tmp_path: Path) -> None:
    """A trainer that takes a second to save after Ctrl-C, which the terminal sends to both processes."""
    (tmp_path / "train_flax.py").write_text(
        "import pathlib, signal, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        "    (here / 'saved').touch()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "(here / 'started').touch()\n"
        "time.sleep(60)\n"
    )
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from shared.compare.command import TrainBoth\nfrom shared.compare.train_both import train_both\n"
        f"here = Path({str(tmp_path)!r})\n"
        "try:\n    train_both(TrainBoth((), here), here)\nexcept KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, start_new_session=True)
    try:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        assert process.wait(timeout=30) == 130
        assert (tmp_path / "saved").exists()
    finally:
        process.kill()
