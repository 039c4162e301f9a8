"""The pictures of both runs as the page shows them, inlined."""

import dataclasses
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup

from shared.compare.page.pictures import (
    Allowance,
    Picture,
    PictureDifference,
    PictureFile,
    PicturePair,
    Pixels,
    UnshowableError,
    amplified,
    as_png,
    as_preview,
    contact_sheets,
    difference,
    folders_leading_out,
    measure,
    read_picture,
    validation_pairs,
    validation_steps,
)

_MOST_EARLIER_STEPS = 8
_MOST_PAIRS = 100  # of a step: a run makes one for each prompt

Inline = Callable[[Picture, Allowance], tuple[str, bytes]]
"""A picture as a kind of file, `png` or `webp`, and its content."""


@dataclasses.dataclass(frozen=True)
class ShownPicture:
    """A picture as a data URL, or, where there is none, why there is none."""

    address: Markup | None
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class ShownPair:
    """A picture of both runs, None where a run has none.

    `difference_picture` and `difference` are None where there is nothing to subtract.
    """

    name: str
    a: ShownPicture | None
    b: ShownPicture | None
    difference: PictureDifference | None
    difference_picture: Markup | None


@dataclasses.dataclass(frozen=True)
class PictureGroups:
    """What the page shows.

    Attributes:
        last_step: the step of `last`, None without pictures.
        earlier: pairs by step, small, evenly picked where there are many; `earlier_steps` says of how many.
        left_out: sentences about what is not shown.
    """

    last_step: int | None
    last: list[ShownPair]
    contact_sheet: ShownPair | None
    earlier: dict[int, list[ShownPair]]
    earlier_steps: int
    left_out: list[str]


def picture_groups(folder_a: Path, folder_b: Path) -> PictureGroups:
    """The pictures of two run folders, those of the last step and the contact sheets as they are."""
    steps = validation_steps(folder_a, folder_b)
    earlier, last_step = steps[:-1], steps[-1] if steps else None
    left_out = [
        f"{folder} is a link that leads out of the run's folder, and is not followed."
        for folder in folders_leading_out(folder_a, folder_b)
    ]
    allowance = Allowance()

    def pairs(step: int) -> list[PicturePair]:
        found = validation_pairs(folder_a, folder_b, step)
        if len(found) > _MOST_PAIRS:
            left_out.append(f"{_MOST_PAIRS} of the {len(found)} pictures of step {step} are shown.")
        return found[:_MOST_PAIRS]

    sheets = contact_sheets(folder_a, folder_b)
    return PictureGroups(
        last_step,
        [] if last_step is None else [_shown(pair, allowance) for pair in pairs(last_step)],
        None if sheets is None else _shown(sheets, allowance),
        {step: [_shown_small(pair, allowance) for pair in pairs(step)] for step in _some(earlier)},
        len(earlier),
        left_out,
    )


def _shown(pair: PicturePair, allowance: Allowance) -> ShownPair:
    shown, difference_HWC = _pair(pair, _as_it_is, allowance)
    if difference_HWC is None or not difference_HWC.any():
        return shown
    picture = Picture(None, amplified(difference_HWC))
    try:
        return dataclasses.replace(shown, difference_picture=_address(*_as_it_is(picture, allowance), allowance))
    except UnshowableError:
        return shown  # its figures are shown


def _shown_small(pair: PicturePair, allowance: Allowance) -> ShownPair:
    return _pair(pair, _preview, allowance)[0]


def _pair(pair: PicturePair, inline: Inline, allowance: Allowance) -> tuple[ShownPair, Pixels | None]:
    """The pair, and where the pictures differ."""
    a, a_HWC = _one(pair.a, inline, allowance)
    b, b_HWC = _one(pair.b, inline, allowance)
    difference_HWC = None if a_HWC is None or b_HWC is None else difference(a_HWC, b_HWC)
    measured = None if difference_HWC is None else measure(difference_HWC)
    return ShownPair(pair.name, a, b, measured, None), difference_HWC


def _one(file: PictureFile | None, inline: Inline, allowance: Allowance) -> tuple[ShownPicture | None, Pixels | None]:
    if file is None:
        return None, None
    try:
        picture = read_picture(file, allowance)
        return ShownPicture(_address(*inline(picture, allowance), allowance)), picture.pixels_HWC
    except UnshowableError as error:
        return ShownPicture(None, str(error)), None


def _as_it_is(picture: Picture, allowance: Allowance) -> tuple[str, bytes]:
    return "png", as_png(picture.pixels_HWC, allowance) if picture.png is None else picture.png


def _preview(picture: Picture, allowance: Allowance) -> tuple[str, bytes]:
    return "webp", as_preview(picture.pixels_HWC)


def _address(kind: str, content: bytes, allowance: Allowance) -> Markup:
    allowance.spend_characters(len(content) * 4 // 3)
    return Markup(f"data:image/{kind};base64,{b64encode(content).decode('ascii')}")


def _some(steps: list[int]) -> list[int]:
    """At most `_MOST_EARLIER_STEPS` of them, evenly picked, the first and the last among them."""
    if len(steps) <= _MOST_EARLIER_STEPS:
        return steps
    last = len(steps) - 1
    return [steps[round(index * last / (_MOST_EARLIER_STEPS - 1))] for index in range(_MOST_EARLIER_STEPS)]
