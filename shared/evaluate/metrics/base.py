"""What a metric is: it looks at every condition with its pictures, and gives figures with their standard errors.

Axes: H height, W width, N channels of the conditions side by side.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Better = Literal["higher", "lower"]

_T = TypeVar("_T")


class Measured(NamedTuple):
    """A held-out pair and what was drawn for it.

    Attributes:
        condition_HWN: uint8, 0 to 255.
        truth_HWC: the pair's own picture, uint8 RGB.
        pictures_HWC: one or several, uint8 RGB, as high and wide.
    """

    condition_HWN: Pixels
    truth_HWC: Pixels
    caption: str
    pictures_HWC: list[Pixels]


@dataclass(frozen=True)
class Figure:
    """A number about all pictures.

    Attributes:
        standard_error: of `value`, of which samples are drawn at random; None where it is not known.
        conditions, pictures: how many it was measured on.
        better: which way good pictures move it.
        note: what has to be known to read it.
    """

    value: float
    standard_error: float | None
    conditions: int
    pictures: int
    better: Better
    note: str = ""


@dataclass(frozen=True)
class Measurement:
    """What a metric found.

    Attributes:
        figures: the first is the metric's main one.
        of_conditions: of figures that are means, the value of each condition, in their order.
    """

    figures: dict[str, Figure]
    of_conditions: dict[str, list[float]]


class Metric(Protocol):
    """Ready to measure, but for models, which it loads when it does."""

    @property
    def settings(self) -> dict[str, str]:
        """What its figures depend on beside the pictures."""
        ...

    @property
    def least_pairs(self) -> int:
        """How many it takes to have a meaning."""
        ...

    def measure(self, measured: Iterable[Measured]) -> Measurement:
        """Look at all conditions, each once, in their order."""
        ...


def means(of_each: Iterable[dict[str, float]], better: Better, pictures: int) -> Measurement:
    """The mean over conditions of what was measured of each.

    Pictures of one condition are no independent samples, so the standard error is that of a mean over conditions:
    their standard deviation (of a sample) divided by the square root of their number; unknown for a single one.

    Args:
        pictures: how many there are, of all conditions.
    """
    rows = list(of_each)
    of_conditions = {name: [row[name] for row in rows] for name in rows[0]}
    figures = {}
    for name, values in of_conditions.items():
        count = len(values)
        error = float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else None
        figures[name] = Figure(float(np.mean(values)), error, count, pictures, better)
    return Measurement(figures, of_conditions)


@dataclass(frozen=True)
class MeanOverConditions:
    """A metric that looks at one condition at a time."""

    of_condition: Callable[[Measured], dict[str, float]]
    better: Better
    settings: dict[str, str]
    least_pairs: int = 1

    def measure(self, measured: Iterable[Measured]) -> Measurement:
        """See `Metric`."""
        pictures, rows = 0, []
        for one in measured:
            rows.append(self.of_condition(one))
            pictures += len(one.pictures_HWC)
        return means(rows, self.better, pictures)


def in_parts(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
