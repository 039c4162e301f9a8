"""What the page says in tables: both runs side by side."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET, UnsetType

from shared.compare.comparability import setting_differences
from shared.compare.page import figures
from shared.compare.report import UNTRAINED, Report
from shared.compare.run import Run
from shared.compare.speed import Speed, measure_speed, percentile

_BIN = re.compile(r"(.*)_t([0-9]{1,9})-([0-9]{1,9})")
_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Row:
    """What a line is about, the cell of either run, and what the second is compared with the first."""

    name: str
    a: str
    b: str
    change: str = ""


def run_rows(a: Run, b: Run) -> list[Row]:
    """What was run, on what."""

    def row(name: str, of: Callable[[Run], str]) -> Row:
        return Row(name, of(a), of(b))

    return [
        row("Backend", lambda run: run.backend),
        row("Devices", lambda run: run.report.devices or figures.MISSING),
        row("Precision", _precision),
        row("Optimizer steps", lambda run: f"{run.steps:,}"),
        row("Images per step", _images_per_step),
        row("Images seen", lambda run: figures.whole(run.report.images_seen)),
        row("Total time", lambda run: figures.duration(run.report.seconds_total)),
        row("Versions", _versions),
        row("Folder", lambda run: str(run.folder.resolve())),
    ]


def setting_rows(a: Run, b: Run) -> list[Row]:
    """Flags with different values."""
    return [Row(f"--{row.name}", _shown(row.a), _shown(row.b)) for row in setting_differences(a, b)]


def speed_rows(a: Run, b: Run) -> list[Row]:
    """Times, rates and memory."""
    speed_a, speed_b = measure_speed(a), measure_speed(b)

    def row(name: str, show: Callable[[float | None], str], of: Callable[[Speed], float | None]) -> Row:
        value_a, value_b = of(speed_a), of(speed_b)
        return Row(name, show(value_a), show(value_b), figures.change(value_a, value_b))

    def reported(name: str, of: Callable[[Report], float | None]) -> Row:
        value_a, value_b = of(a.report), of(b.report)
        return Row(name, figures.gibibytes(value_a), figures.gibibytes(value_b), figures.change(value_a, value_b))

    return [
        row("Step time, median", figures.seconds, lambda speed: percentile(speed.step_time_N, 50)),
        row("Step time, 90th percentile", figures.seconds, lambda speed: percentile(speed.step_time_N, 90)),
        row("Images per second, median", figures.plain, lambda speed: percentile(speed.images_per_second_N, 50)),
        row(
            "Images per second, 90th percentile", figures.plain, lambda speed: percentile(speed.images_per_second_N, 90)
        ),
        row("Waiting for data in a step, median", figures.seconds, lambda speed: percentile(speed.data_wait_N, 50)),
        row("The same as a share of the step", figures.percent, lambda speed: percentile(speed.data_wait_share_N, 50)),
        reported("Peak memory, host", lambda report: report.peak_host_memory_gib),
        reported("Peak memory, fullest device", lambda report: report.peak_device_memory_gib),
    ]


@dataclass(frozen=True)
class EvaluationRow:
    """A figure on held-out samples: of the untrained model, after training in either run, and their difference."""

    name: str
    untrained: str
    a: str
    b: str
    difference: str


def evaluation_rows(a: Run, b: Run) -> list[EvaluationRow]:
    """The held-out figures that either run has."""
    of_a, of_b = a.report.figures, b.report.figures
    rows = [
        EvaluationRow(
            readable(name),
            figures.plain(_first(of_a.get(f"{name}{UNTRAINED}"), of_b.get(f"{name}{UNTRAINED}"))),
            figures.plain(of_a.get(name)),
            figures.plain(of_b.get(name)),
            figures.difference(of_a.get(name), of_b.get(name)),
        )
        for name in dict.fromkeys([*a.report.evaluation_names, *b.report.evaluation_names])
    ]
    if not all(run.report.convergence_step is UNSET for run in (a, b)):
        step_a, step_b = (_set_or_none(run.report.convergence_step) for run in (a, b))
        rows.append(
            EvaluationRow(
                name="follows its condition since step",
                untrained="",
                a=figures.whole(step_a),
                b=figures.whole(step_b),
                difference=figures.MISSING if step_a is None or step_b is None else f"{step_b - step_a:+,}",
            )
        )
    return rows


def is_of_a_timestep_bin(name: str) -> bool:
    """Whether the figure is a loss over a part of the timesteps, as `validation_loss_t000-249` is."""
    return _BIN.fullmatch(name) is not None


def readable(name: str) -> str:
    """A figure's name as words: `validation_loss_t000-249` is `validation loss, timesteps 0–249`."""
    if in_bin := _BIN.fullmatch(name):
        return f"{readable(in_bin[1])}, timesteps {int(in_bin[2])}–{int(in_bin[3])}"
    return name.replace("_", " ").replace("iou", "IoU").replace("f1", "F1")


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _set_or_none(step: int | UnsetType | None) -> int | None:
    return None if isinstance(step, UnsetType) else step


def _precision(run: Run) -> str:
    return _PRECISIONS[run.mixed_precision] + (", TF32 allowed" if run.config.allow_tf32 else "")


def _images_per_step(run: Run) -> str:
    passes = run.config.gradient_accumulation_steps
    return figures.whole(run.global_batch_size) + (f", in {passes} passes" if passes > 1 else "")


def _versions(run: Run) -> str:
    return ", ".join(f"{name} {number}" for name, number in (run.report.versions or {}).items())


def _shown(value: Any) -> str:
    if value is None:
        return figures.MISSING
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
