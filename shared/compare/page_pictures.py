"""The pictures of both runs as the page shows them, inlined."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from shared.compare.pictures import (
    PictureDifference,
    PicturePair,
    Pixels,
    amplified,
    contact_sheets,
    inlined,
    inlined_pixels,
    inlined_preview,
    measure,
    validation_pairs,
    validation_steps,
)

_MOST_EARLIER_STEPS = 8


@dataclasses.dataclass(frozen=True)
class ShownPair:
    """A picture of both runs as data URLs, None where a run has none.

    `difference_picture` and `difference` are None where there is nothing to subtract.
    """

    name: str
    a: str | None
    b: str | None
    difference: PictureDifference | None
    difference_picture: str | None


@dataclasses.dataclass(frozen=True)
class PictureGroups:
    """What the page shows.

    Attributes:
        last_step: the step of `last`, None without pictures.
        earlier: pairs by step, small, evenly picked where there are many; `earlier_steps` says of how many.
    """

    last_step: int | None
    last: list[ShownPair]
    contact_sheet: ShownPair | None
    earlier: dict[int, list[ShownPair]]
    earlier_steps: int


def picture_groups(folder_a: Path, folder_b: Path) -> PictureGroups:
    """The pictures of two run folders, those of the last step and the contact sheets as they are."""
    steps = validation_steps(folder_a, folder_b)
    earlier, last_step = steps[:-1], steps[-1] if steps else None
    sheets = contact_sheets(folder_a, folder_b)
    return PictureGroups(
        last_step,
        [] if last_step is None else [_shown(pair) for pair in validation_pairs(folder_a, folder_b, last_step)],
        None if sheets is None else _shown(sheets),
        {step: [_shown_small(pair) for pair in validation_pairs(folder_a, folder_b, step)] for step in _some(earlier)},
        len(earlier),
    )


def _shown(pair: PicturePair) -> ShownPair:
    difference_HWC = pair.difference_HWC()
    shown = _pair(pair, inlined, difference_HWC)
    if difference_HWC is None or not difference_HWC.any():
        return shown
    return dataclasses.replace(shown, difference_picture=inlined_pixels(amplified(difference_HWC)))


def _shown_small(pair: PicturePair) -> ShownPair:
    return _pair(pair, inlined_preview, pair.difference_HWC())


def _pair(pair: PicturePair, inline: Callable[[Path], str], difference_HWC: Pixels | None) -> ShownPair:
    return ShownPair(
        name=pair.name,
        a=None if pair.a is None else inline(pair.a),
        b=None if pair.b is None else inline(pair.b),
        difference=None if difference_HWC is None else measure(difference_HWC),
        difference_picture=None,
    )


def _some(steps: list[int]) -> list[int]:
    """At most `_MOST_EARLIER_STEPS` of them, evenly picked, the first and the last among them."""
    if len(steps) <= _MOST_EARLIER_STEPS:
        return steps
    last = len(steps) - 1
    return [steps[round(index * last / (_MOST_EARLIER_STEPS - 1))] for index in range(_MOST_EARLIER_STEPS)]
