"""A packing that is killed goes on where it was, and leaves what one leaves that nobody killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.end_to_end.support.running import PROJECT


def test_killed_again_and_again_it_leaves_the_same_bytes(tmp_path: Path) -> None:
    words = ["--generated_circles", "90", "--resolution", "192", "--samples_per_shard", "10", "--num_workers", "2"]
    command = [sys.executable, "-m", "shared.prepare_data", "pack", *words, "--output_dir"]
    subprocess.run([*command, str(tmp_path / "whole")], cwd=PROJECT, check=True, capture_output=True)
    interrupted = tmp_path / "interrupted"
    kept: dict[str, int] = {}
    kills = 0
    for count in (1, 3, 4, 7):
        process = subprocess.Popen([*command, str(interrupted)], cwd=PROJECT, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(interrupted.glob("*.tar"))) < count:
            time.sleep(0.002)
        time.sleep(0.01 * count)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        for path in interrupted.glob("*.tar"):
            assert kept.setdefault(path.name, path.stat().st_ino) == path.stat().st_ino, "it was made twice"
    assert kills >= 2
    subprocess.run([*command, str(interrupted)], cwd=PROJECT, check=True, capture_output=True)
    assert {name: (interrupted / name).stat().st_ino for name in kept} == kept
    assert sorted(os.listdir(interrupted)) == sorted(os.listdir(tmp_path / "whole"))
    for path in (tmp_path / "whole").iterdir():
        if path.suffix != ".shard_index":  # it knows when a shard was written
            assert (interrupted / path.name).read_bytes() == path.read_bytes(), path.name
