"""A run's folder: made before anything costs time, finished with a report."""

import json
import math
import os
from pathlib import Path
from typing import Any

from shared.config import TrainConfig


def make_run_folder(config: TrainConfig) -> Path:
    """`--output_dir`, made where missing.

    Raises:
        ValueError: it cannot be made or written to.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder} cannot be made: {error.strerror}. Choose a folder that you may write to."
        ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output_dir {folder} cannot be written to. Choose a folder that you may write to.")
    return folder


def is_finished(folder: Path, last_step: int, resumed_at: int) -> bool:
    """Whether the folder holds the result of the run that stands at its last step: its report says so."""
    report = folder / "report.json"
    if resumed_at < last_step or not report.is_file():
        return False
    return bool(json.loads(report.read_text(encoding="utf-8")).get("steps") == last_step)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json`, whole or not at all. JSON has no NaN or infinity: such a figure is written as null."""
    figures = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in report.items()
    }
    unfinished = folder / "report.json.tmp"
    unfinished.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(folder / "report.json")
