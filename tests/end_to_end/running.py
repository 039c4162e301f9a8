"""Runs the entry points as users do: in a process of their own, from the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def train_flax(arguments: Sequence[str | Path | int | float], *, devices: int = 1, **environment: str) -> str:
    """Run `train_flax.py` to its end; returns what it wrote to stderr and stdout. Fails where it fails."""
    done = start_train_flax(arguments, devices=devices, **environment)
    output, _ = done.communicate(timeout=600)
    assert done.returncode == 0, output
    return output


def start_train_flax(
    arguments: Sequence[str | Path | int | float], *, devices: int = 1, **environment: str
) -> subprocess.Popen[str]:
    """The same, still running."""
    return subprocess.Popen(
        [sys.executable, "train_flax.py", *map(str, arguments)],
        cwd=PROJECT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(run)]
