"""The page: the figures, how they came about, and pairs with their pictures."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from markupsafe import Markup

from shared.compare.page import figures
from shared.compare.page.environment import page_environment, style
from shared.compare.page.pictures import as_preview
from shared.config.public import public_values
from shared.evaluate.measuring import pictures_of
from shared.evaluate.metrics.base import Figure, Measurement
from shared.evaluate.options import EVALUATE_FLAGS
from shared.evaluate.output_folder import KeptMeasurement
from shared.evaluate.preparation import Evaluation
from shared.evaluation.image_grid import condition_pictures

_HERE = Path(__file__).parent
_PAIRS = 6  # in each part of the page
_COPIES = 4  # pictures of a pair


@dataclass(frozen=True)
class FigureRow:
    """A figure as people read it."""

    name: str
    value: str
    error: str
    figure: Figure


@dataclass(frozen=True)
class ShownPair:
    """A pair: captioned pictures as data URLs, and the values that were measured of it."""

    place: int
    caption: str
    pictures: list[tuple[str, Markup]]
    values: list[tuple[str, str]]


def render(evaluation: Evaluation, found: Mapping[str, KeptMeasurement]) -> str:
    """The page as HTML.

    Raises:
        UserError: a picture cannot be read.
    """
    measured = {name: one.found for name, one in found.items()}
    of_pairs = {name: values for one in measured.values() for name, values in one.of_conditions.items()}

    @cache
    def pair(place: int) -> ShownPair:
        return _shown(evaluation, place, of_pairs)

    ranked = [
        (f"{title}, by {name}", list(map(pair, places)))
        for one in measured.values()
        for title, name, places in _ranked(one)
    ]
    settings = public_values(evaluation.config, EVALUATE_FLAGS)
    return (
        page_environment(_HERE)
        .get_template("page.html.j2")
        .render(
            style=style(),
            controlnets=[controlnet.name for controlnet in evaluation.models.controlnets],
            evaluation=evaluation,
            base_model=evaluation.drawn_with["base_model"],
            rows=[row for one in measured.values() for row in _rows(one)],
            settings={name: _value(value) for name, value in settings.items() if value != EVALUATE_FLAGS[name].default},
            of_metrics={name: one.settings for name, one in found.items()},
            parts=[("The first", list(map(pair, range(min(_PAIRS, len(evaluation.samples)))))), *ranked],
        )
    )


def _rows(measurement: Measurement) -> list[FigureRow]:
    return [
        FigureRow(name, figures.plain(one.value, 4), figures.plain(one.standard_error, 2), one)
        for name, one in measurement.figures.items()
    ]


def _ranked(measurement: Measurement) -> list[tuple[str, str, list[int]]]:
    """Worst and best pairs by a metric's main figure; none where it has no value for each, or all are shown anyway."""
    name = next(iter(measurement.figures))
    values = measurement.of_conditions.get(name, [])
    if len(values) <= _PAIRS:
        return []
    upwards = np.argsort(values, kind="stable").tolist()
    worst_first = upwards if measurement.figures[name].better == "higher" else upwards[::-1]
    return [("The worst", name, worst_first[:_PAIRS]), ("The best", name, worst_first[: -_PAIRS - 1 : -1])]


def _shown(evaluation: Evaluation, place: int, of_pairs: Mapping[str, Sequence[float]]) -> ShownPair:
    one = pictures_of(evaluation, place)
    conditions = condition_pictures(one.condition_HWN, [kind.channels for kind in evaluation.models.conditions])
    drawn = one.pictures_HWC[:_COPIES]
    captioned = [
        *conditions,
        *((f"picture {copy + 1}" if len(drawn) > 1 else "picture", picture) for copy, picture in enumerate(drawn)),
        ("truth", one.truth_HWC),
    ]
    return ShownPair(
        place,
        one.caption,
        [(words, _inlined(picture)) for words, picture in captioned],
        [(name, figures.plain(values[place])) for name, values in of_pairs.items()],
    )


def _inlined(image_HWC: np.ndarray) -> Markup:
    return Markup(f"data:image/webp;base64,{b64encode(as_preview(image_HWC)).decode('ascii')}")


def _value(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
