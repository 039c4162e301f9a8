"""A finished run, read from its folder."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shared.compare.report import Report, read_report
from shared.config import TrainConfig
from shared.config.arguments import value_of
from shared.config.options import FLAGS
from shared.config.support import BACKEND_NAMES
from shared.config.yaml_io import read_yaml
from shared.run.folder import RUN_CONFIG
from shared.tracking.metrics_file import LARGEST_METRICS, METRICS_FILE, read_metrics
from shared.untrusted import MIB, check_plain_files, is_inside, open_file, shown
from shared.user_errors import UserError

_MOST_FIGURES = 12 * 10**6
"""In metrics.jsonl: more than a million logged steps have, and about a gigabyte in memory."""

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
    report: Report
    entries: Sequence[Entry]

    @property
    def backend(self) -> str:
        """The backend's name as people write it."""
        return BACKEND_NAMES[self.report.backend]

    @property
    def steps(self) -> int:
        return self.report.steps

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step."""
        return self.report.global_batch_size

    @property
    def mixed_precision(self) -> str:
        """What was computed in besides float32: `bf16`, `fp16` or `no`."""
        return self.config.mixed_precision or "no"

    @cached_property
    def training_entries(self) -> list[Entry]:
        """The entries about training steps; some entries hold only an evaluation."""
        return [entry for entry in self.entries if "loss" in entry]


def check_is_finished(folder: Path) -> None:
    """Whether this is the folder of a finished run, as far as its files' names tell.

    Raises:
        UserError: there is no such folder, it is not a run's, or the run is not finished.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{shown(folder)} is not a folder. Give the --output_dir of a finished run.")
    if not any(os.path.lexists(folder / name) for name in (RUN_CONFIG, METRICS_FILE)):
        raise UserError(
            f"{shown(folder)} is not a run's folder: it has neither config.yaml nor {METRICS_FILE}. Give the "
            "--output_dir of a finished run."
        )
    for name in ("report.json", RUN_CONFIG, METRICS_FILE):
        if not os.path.lexists(folder / name):
            raise UserError(
                f"The run in {shown(folder)} is not finished: it has no {name}. Continue it with "
                "--resume_from_checkpoint latest, then compare."
            )
        check_inside(folder / name, folder)


def check_inside(path: Path, run: Path) -> None:
    """Raises UserError where a link leads out of the run's folder, whose page others may see."""
    if not is_inside(path, [run]):
        raise UserError(
            f"{shown(path)} is a link that leads out of the run's folder {shown(run)}, and is not followed. Put what "
            "it means in its place."
        )


def open_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: as `check_is_finished`, the run went on after its report, or a file is damaged.
    """
    check_is_finished(folder)
    report = read_report(folder / "report.json")
    entries = _read_entries(folder)
    last = max((int(entry["step"] or 0) for entry in entries), default=0)
    if last != report.steps:
        raise UserError(
            f"The run in {shown(folder)} is not finished: its report is of step {report.steps}, but its metrics are of "
            f"step {last}. Continue it with --resume_from_checkpoint latest, then compare."
        )
    return Run(folder, _read_config(folder / RUN_CONFIG), report, entries)


def _read_config(path: Path) -> TrainConfig:
    """Whether it is one to train with is not asked: that was asked when it was."""
    assignments = read_yaml(str(path), FLAGS)
    values = {one.name: value_of(one, FLAGS[one.name]) for one in assignments}
    for name, value in values.items():
        choices = FLAGS[name].choices
        if choices and value is not None and value not in choices:
            raise UserError(f"{shown(path)}: {name} is {shown(repr(value))}, expected one of {', '.join(choices)}.")
    return TrainConfig(**values)


def _read_entries(folder: Path) -> list[dict[str, float]]:
    _check_figures(folder / METRICS_FILE)
    try:
        return read_metrics(folder)
    except ValueError as error:
        raise UserError(f"The metrics in {shown(folder)} are damaged: {error}") from error


def _check_figures(metrics: Path) -> None:
    """Raises UserError for more figures than memory should be filled with; reads within bounded memory."""
    figures = 0
    check_plain_files((metrics,), LARGEST_METRICS)
    with open_file(metrics) as file:
        while block := file.read(MIB):
            figures += block.count(b":")
            if figures > _MOST_FIGURES:
                raise UserError(f"{shown(metrics)} has more than {_MOST_FIGURES:,} figures, which no honest run has.")
