"""The figures of a run as JSON Lines: one object per logged step, readable while the run goes on."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends `{"step": …, name: value, …}` to a file, one line per call, flushed.

    JSON has no NaN or infinity: such a value is written as null.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        # A run that was killed in the middle of a line must not have its next line glued to it.
        self._replace_lines(_complete_lines(path))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        entry = {"step": step} | {name: _json_number(value) for name, value in metrics.items()}
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._file.flush()

    def images(self, tag: str, images: Sequence[tuple[str, np.ndarray]], step: int) -> None:
        """Nothing: images are kept as files of their own."""

    def truncate_after(self, step: int) -> None:
        self._file.close()
        self._replace_lines([line for line in _complete_lines(self._path) if json.loads(line)["step"] <= step])

    def close(self) -> None:
        self._file.close()

    def _replace_lines(self, lines: Sequence[str]) -> None:
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="utf-8")


def read_metrics(run_directory: Path) -> list[dict[str, float]]:
    """Every complete entry of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in _complete_lines(run_directory / METRICS_FILE)]


def _complete_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
