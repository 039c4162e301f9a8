"""Line charts as SVG to stand inside a page, whose stylesheet colours them.

matplotlib writes colours into every element; the placeholders below become the page's CSS variables, so that a chart
follows light and dark mode.

Axes: N points.
"""

import io
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter

from shared.compare.page.figures import power_of_ten
from shared.compare.series import Floats
from shared.untrusted import shown

_COLOURS = {
    "#0000a1": "var(--a)",
    "#0000b1": "var(--b)",
    "#0000c1": "var(--quiet)",
    "#0000d1": "var(--line)",
    "#0000e1": "var(--limit)",
    "#0000f1": "var(--ink)",
}
_A, _B, _QUIET, _LINE, _LIMIT, _INK = _COLOURS

_SIZE = (5.0, 2.8)  # inches at 72 per inch: about as wide as a phone, so that the text is legible there
_MOST_BINS = 400
_SUMMED_FROM = 100_000  # steps; from there on a convolution takes minutes, and running sums are exact enough to draw
_SMOOTHED_FROM = 100  # steps; below, single steps are drawn alone
_LARGEST_DRAWN = 1e100  # matplotlib multiplies and squares; what is larger is left out, as what is no number
_LONGEST_LABEL = 100  # characters
_FLOOR_POWER = -9  # below the resolution of float32: what is drawn here is equal
_FLOOR = 10.0**_FLOOR_POWER

_TAG = re.compile(r"<[^>]*>")  # text and attributes have their > escaped

_numbers = count()


@dataclass(frozen=True)
class Curve:
    """Values [N] at steps [N]."""

    steps_N: npt.NDArray[np.int64]
    values_N: Floats


def curves_chart(
    a: Curve, b: Curve, label: str, *, smooth: bool = False, from_zero: bool = False, points: bool = False
) -> str:
    """Both runs' curves over the steps.

    Args:
        label: of the vertical axis, with the unit.
        smooth: draw a running mean over the single steps where there are many (see `smoothing_window`).
        from_zero: begin the vertical axis at 0.
        points: mark every value; for the few of an evaluation.
    """
    with _chart() as (figure, axes):
        # both can be seen where they coincide
        for whole, colour, width, style in ((a, _A, 3.0, "-"), (b, _B, 1.8, (0, (4, 2.5)))):
            curve = _drawable(whole)
            window = smoothing_window(curve.values_N.size) if smooth else 1
            if window > 1:
                axes.plot(*_thinned(curve.steps_N, curve.values_N), color=colour, linewidth=0.5, alpha=0.3)
            steps_N, values_N = _running_mean(curve, window)
            marker = "o" if points else ""
            axes.plot(
                *_thinned(steps_N, values_N),
                color=colour,
                linewidth=width,
                linestyle=style,
                marker=marker,
                markersize=width + 2,
            )
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        if from_zero:
            axes.set_ylim(bottom=0)
        return _finished(figure, axes, label)


def difference_chart(curve: Curve, tolerance: float | None) -> str:
    """A relative difference of the runs over the steps, on a logarithmic axis, with the tolerance as a line.

    What is equal stands at the lower edge; infinite differences are left out.
    """
    steps_N, difference_N = curve.steps_N, curve.values_N
    with _chart() as (figure, axes):
        axes.set_yscale("log")
        finite_N = np.isfinite(difference_N)
        drawn_N = np.maximum(difference_N[finite_N], _FLOOR)
        few = drawn_N.size < _SMOOTHED_FROM
        axes.plot(
            *_thinned(steps_N[finite_N], drawn_N),
            color=_INK,
            linewidth=1.0 if few else 0.0,
            marker="o",
            markersize=3.5 if few else 1.6,
        )
        if tolerance is not None:
            axes.axhline(tolerance, color=_LIMIT, linewidth=1.2, linestyle=(0, (5, 3)))
            axes.set_title(f"– –  tolerance {power_of_ten(tolerance)}", loc="right", fontsize=10, color=_LIMIT)
        top = max(drawn_N.max(initial=_FLOOR), tolerance or _FLOOR, 100 * _FLOOR) * 3
        ticks = [power for power in range(_FLOOR_POWER, 3, 2) if 10.0**power < top]
        axes.set_yticks([10.0**power for power in ticks], ["equal", *(power_of_ten(10.0**p) for p in ticks[1:])])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(_FLOOR / 2, top)
        return _finished(figure, axes, "relative difference")


def smoothing_window(size: int) -> int:
    """Over how many logged steps a smoothed curve of `size` steps is averaged; 1 for none."""
    return size // 40 if size >= _SMOOTHED_FROM else 1


@contextmanager
def _chart() -> Iterator[tuple[Figure, Axes]]:
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text
        "text.parse_math": False,  # a label is text, with any dollars in it
        "svg.hashsalt": f"chart {next(_numbers)}",  # names of clip paths are the page's, not the chart's
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _QUIET,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _QUIET,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _LINE,
        "grid.linewidth": 0.6,
        "xtick.color": _QUIET,
        "ytick.color": _QUIET,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "lines.solid_joinstyle": "round",
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        # The text is measured with a font that lacks some letters, and drawn by the browser, which has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=_SIZE, dpi=72, layout="constrained")
        yield figure, figure.add_subplot()


def _finished(figure: Figure, axes: Axes, label: str) -> str:
    label = shown(label, _LONGEST_LABEL)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.margins(x=0.02)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    return _for_a_page(file.getvalue(), label)


def _for_a_page(svg: str, label: str) -> str:
    """Without what only a file of its own needs: prologue, size, fonts, names."""
    svg = svg[svg.index("<svg") :]
    opening = svg.index(">")
    view_box = re.search(r'viewBox="[^"]*"', svg[:opening])
    assert view_box is not None, svg[:opening]
    body = svg[opening + 1 :].replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', " ".join(_TAG.findall(body))))
    body = _TAG.sub(lambda tag: _tag_for_a_page(tag[0], used), body)
    return f'<svg {view_box[0]} role="img" aria-label="{escape(label)}">{body}'


def _tag_for_a_page(tag: str, used: Collection[str]) -> str:
    tag = re.sub(r' id="([^"]*)"', lambda name: name[0] if name[1] in used else "", tag)
    tag = re.sub(r"(font: [\d.]+px )[^;\"]*", r"\1sans-serif", tag)
    for placeholder, colour in _COLOURS.items():
        tag = tag.replace(placeholder, colour)
    return tag


def _drawable(curve: Curve) -> Curve:
    values_N = np.where(np.abs(curve.values_N) <= _LARGEST_DRAWN, curve.values_N, np.nan)
    return Curve(curve.steps_N, values_N)


def _running_mean(curve: Curve, window: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """The mean of the last `window` values, at the last one's step."""
    if window == 1:
        return curve.steps_N, curve.values_N
    return curve.steps_N[window - 1 :], _means(curve.values_N, window)


def _means(values_N: Floats, window: int) -> Floats:
    if values_N.size <= _SUMMED_FROM:
        return np.convolve(values_N, np.full(window, 1 / window), mode="valid")
    finite_N = np.isfinite(values_N)
    sums = np.cumsum(np.append(0.0, np.where(finite_N, values_N, 0.0)))
    missing = np.cumsum(np.append(0, ~finite_N))
    means = (sums[window:] - sums[:-window]) / window
    return np.where(missing[window:] == missing[:-window], means, np.nan)


def _thinned(steps_N: npt.NDArray[np.int64], values_N: Floats) -> tuple[Sequence[int], Sequence[float]]:
    """Of very many points only the lowest and the highest of each bin: the same picture in fewer bytes."""
    if steps_N.size <= 4 * _MOST_BINS:
        return steps_N.tolist(), values_N.tolist()
    kept: set[int] = set()
    for indices in np.array_split(np.arange(steps_N.size), _MOST_BINS):
        values = values_N[indices]
        if np.isfinite(values).any():
            kept |= {int(indices[np.nanargmin(values)]), int(indices[np.nanargmax(values)])}
    order = sorted(kept)
    return steps_N[order].tolist(), values_N[order].tolist()
