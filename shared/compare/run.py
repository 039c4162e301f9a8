"""A finished run, read from its folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.config import TrainConfig
from shared.config.arguments import value_of
from shared.config.options import FLAGS
from shared.config.support import BACKEND_NAMES
from shared.config.yaml_io import read_yaml
from shared.tracking.metrics_file import METRICS_FILE, read_metrics

Entry = Mapping[str, float | None]
"""One line of metrics.jsonl: `step` and the figures by name; None where a figure was not finite."""


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        report: report.json.
        entries: metrics.jsonl, in order of the steps.
    """

    folder: Path
    config: TrainConfig
    report: Mapping[str, Any]
    entries: Sequence[Entry]

    @property
    def backend(self) -> str:
        """The backend's name as people write it."""
        return BACKEND_NAMES[self.report["backend"]]

    @property
    def steps(self) -> int:
        return int(self.report["steps"])

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step."""
        return int(self.report["global_batch_size"])

    @property
    def mixed_precision(self) -> str:
        """What was computed in besides float32: `bf16`, `fp16` or `no`."""
        return self.config.mixed_precision or "no"

    @cached_property
    def training_entries(self) -> list[Entry]:
        """The entries about training steps; some entries hold only an evaluation."""
        return [entry for entry in self.entries if "loss" in entry]

    @cached_property
    def evaluation_names(self) -> list[str]:
        """The figures measured on held-out samples; a report has each of them twice, once of the untrained model."""
        return [name for name in self.report if f"{name}_untrained" in self.report]


def check_is_finished(folder: Path) -> None:
    """Whether this is the folder of a finished run, as far as its files' names tell.

    Raises:
        ValueError: there is no such folder, it is not a run's, or the run is not finished.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give the --output_dir of a finished run.")
    if not any((folder / name).is_file() for name in ("config.yaml", METRICS_FILE)):
        raise ValueError(
            f"{folder} is not a run's folder: it has neither config.yaml nor {METRICS_FILE}. Give the --output_dir of "
            "a finished run."
        )
    for name in ("report.json", "config.yaml", METRICS_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"The run in {folder} is not finished: it has no {name}. Continue it with "
                "--resume_from_checkpoint latest, then compare."
            )


def open_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: as `check_is_finished`, the run went on after its report, or a file is damaged.
    """
    check_is_finished(folder)
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        entries = read_metrics(folder)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"A report or the metrics in {folder} are damaged: {error}. Run the training again."
        ) from error
    missing = {"backend", "steps", "global_batch_size"} - set(report)
    if missing:
        raise ValueError(
            f"{folder / 'report.json'} lacks {', '.join(sorted(missing))}: another version of this project wrote it. "
            "Run the training again with this one."
        )
    last = max((int(entry["step"]) for entry in entries), default=0)
    if last != report["steps"]:
        raise ValueError(
            f"The run in {folder} is not finished: its report is of step {report['steps']}, but its metrics are of "
            f"step {last}. Continue it with --resume_from_checkpoint latest, then compare."
        )
    assignments = read_yaml(str(folder / "config.yaml"), FLAGS)
    config = TrainConfig(**{one.name: value_of(one, FLAGS[one.name]) for one in assignments})
    return Run(folder, config, report, entries)
