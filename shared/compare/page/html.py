"""The page: one HTML file with everything in it."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from shared.compare.comparison import Comparison
from shared.compare.page import figures, tables
from shared.compare.page.charts import Curve, curves_chart, difference_chart, smoothing_window
from shared.compare.page.environment import page_environment, style
from shared.compare.page.page_pictures import picture_groups
from shared.compare.page.pictures import AMPLIFICATION
from shared.compare.run import Run
from shared.compare.series import Series, values_of
from shared.compare.speed import measure_speed
from shared.compare.verdict import CONTROLNET_TOLERANCE, LOSS_TOLERANCE

_HERE = Path(__file__).parent
_WORST_TENSORS = 8
_SCALE = (-9, 0)  # powers of ten at the ends of a scale of relative differences


@dataclass(frozen=True)
class Gauge:
    """A relative difference on a scale, beside its tolerance."""

    name: str
    value: float
    tolerance: float
    detail: str
    within: bool


@dataclass(frozen=True)
class ChartPair:
    """A figure over the steps: both runs' curves, and the relative difference with its worst step."""

    curves: Markup
    difference: Markup
    worst: float
    worst_step: int
    equal_steps: int
    steps: int
    window: int


def render(comparison: Comparison) -> str:
    """The page as HTML."""
    environment = page_environment(_HERE)
    environment.filters |= {
        "scientific": figures.scientific,
        "plain": figures.plain,
        "place": _place,
        "power_of_ten": figures.power_of_ten,
    }
    a, b = comparison.a, comparison.b
    return environment.get_template("page.html.j2").render(
        style=style(),
        comparison=comparison,
        verdict=comparison.verdict,
        a=a,
        b=b,
        labels=comparison.labels,
        gauges=_gauges(comparison),
        run_rows=tables.run_rows(a, b),
        setting_rows=tables.setting_rows(a, b),
        loss=_chart_pair(comparison.loss, "loss", LOSS_TOLERANCE),
        grad_norm=_chart_pair(comparison.grad_norm, "gradient norm", None),
        tolerance=CONTROLNET_TOLERANCE,
        blocks=comparison.drift.blocks(),
        worst_tensors=comparison.drift.worst(_WORST_TENSORS),
        checkpoint_chart=_checkpoint_chart(comparison),
        speed_rows=tables.speed_rows(a, b),
        speed_charts=_speed_charts(a, b),
        evaluation_rows=tables.evaluation_rows(a, b),
        evaluation_charts=_evaluation_charts(a, b),
        pictures=picture_groups(a.folder, b.folder),
        amplification=AMPLIFICATION,
    )


def _gauges(comparison: Comparison) -> list[Gauge]:
    verdict = comparison.verdict
    steps = f"worst of {verdict.steps_compared:,} logged steps, at step {verdict.loss_step:,}"
    if verdict.first_step_apart is not None:
        steps += f"; first beyond the tolerance at step {verdict.first_step_apart:,}"
    parameters = f"L2 norm over its {comparison.drift.size / 1e6:,.1f} M parameters"
    return [
        Gauge("Loss", verdict.loss, LOSS_TOLERANCE, steps, verdict.losses_agree),
        Gauge("Final ControlNet", verdict.controlnet, CONTROLNET_TOLERANCE, parameters, verdict.controlnets_agree),
    ]


def _place(relative: float) -> str:
    """Where a relative difference stands on the logarithmic scale, in percent; equality stands at its beginning."""
    low, high = _SCALE
    if relative == 0:
        return "0"
    power = high if math.isinf(relative) else math.log10(relative)
    return f"{min(100.0, max(1.5, 100 * (power - low) / (high - low))):.1f}"


def _chart_pair(series: Series, label: str, tolerance: float | None) -> ChartPair:
    difference_N = series.relative_difference_N
    worst = int(np.argmax(difference_N))
    return ChartPair(
        curves=Markup(
            curves_chart(Curve(series.steps_N, series.a_N), Curve(series.steps_N, series.b_N), label, smooth=True)
        ),
        difference=Markup(difference_chart(Curve(series.steps_N, difference_N), tolerance)),
        worst=float(difference_N[worst]),
        worst_step=int(series.steps_N[worst]),
        equal_steps=int((difference_N == 0).sum()),
        steps=difference_N.size,
        window=smoothing_window(difference_N.size),
    )


def _checkpoint_chart(comparison: Comparison) -> Markup | None:
    if not comparison.checkpoint_drift:
        return None
    points = {**comparison.checkpoint_drift, comparison.a.steps: comparison.drift.relative}
    steps = sorted(points)
    curve = Curve(np.array(steps, np.int64), np.array([points[step] for step in steps], np.float64))
    return Markup(difference_chart(curve, CONTROLNET_TOLERANCE))


def _speed_charts(a: Run, b: Run) -> list[Markup]:
    speed_a, speed_b = measure_speed(a), measure_speed(b)
    if min(speed_a.steps_N.size, speed_b.steps_N.size) == 0:
        return []
    return [
        Markup(
            curves_chart(
                Curve(speed_a.steps_N, values_a), Curve(speed_b.steps_N, values_b), label, smooth=True, from_zero=True
            )
        )
        for label, values_a, values_b in (
            ("step time in seconds", speed_a.step_time_N, speed_b.step_time_N),
            ("images per second", speed_a.images_per_second_N, speed_b.images_per_second_N),
        )
    ]


def _evaluation_charts(a: Run, b: Run) -> list[Markup]:
    """Of every figure but the loss by timestep bin, which the table has."""
    common = [name for name in a.report.evaluation_names if name in b.report.figures]
    return [
        Markup(curves_chart(_evaluations(a, name), _evaluations(b, name), tables.readable(name), points=True))
        for name in common
        if not tables.is_of_a_timestep_bin(name)
    ]


def _evaluations(run: Run, name: str) -> Curve:
    entries = [entry for entry in run.entries if entry.get(name) is not None]
    return Curve(values_of(entries, "step").astype(np.int64), values_of(entries, name))
