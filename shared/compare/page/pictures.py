"""The pictures that both runs made, and how far they lie apart.

They may be anything, and so is the folder that they are in: what cannot be shown is said.

Axes: H height, W width, C = 3 channels.
"""

import os
import re
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image

from shared.compare.report import MOST_STEPS
from shared.untrusted import MIB, foreign_library, is_inside, read_file, shown
from shared.untrusted.pictures import check_pixels, open_picture

Pixels = npt.NDArray[np.uint8]

AMPLIFICATION = 8
"""By how much the picture of a difference is brighter than the difference."""

_LARGEST_FILE = 256 * MIB  # nothing larger has room on the page
_PREVIEW_WIDTH = 720  # pixels
_STEP_FOLDER = re.compile(r"step-(0|[1-9][0-9]{0,15})")


class UnshowableError(Exception):
    """A picture that the page does not show; the message says why."""


@dataclass
class Allowance:
    """How much of the pictures may still be decoded, and put into the page: others' folders may hold any amount.

    Attributes:
        pixels: to decode. Ten prompts and nine steps of grids of 5 million in two runs are 900 million.
        tight_pixels: to make as small a PNG of as there is, which takes up to some seconds for each million.
        characters: to put into the page, which is in memory five times while it is made, and must open in a browser.
    """

    pixels: int = 2 * 10**9
    tight_pixels: int = 20 * 10**6
    characters: int = 256 * 10**6

    def spend_pixels(self, pixels: int) -> None:
        if pixels > self.pixels:
            raise UnshowableError("there are too many and too large pictures to look at all of them")
        self.pixels -= pixels

    def spend_characters(self, characters: int) -> None:
        if characters > self.characters:
            raise UnshowableError("the page has too many and too large pictures already")
        self.characters -= characters


@dataclass(frozen=True)
class PictureDifference:
    """Absolute differences of the values, 0 to 255 each: their mean and the largest."""

    mean: float
    largest: int


@dataclass(frozen=True)
class PictureFile:
    """A picture in a run's folder, which it must not lead out of."""

    path: Path
    run: Path

    def content(self) -> bytes:
        """The file as it is. Raises UnshowableError."""
        if not is_inside(self.path, [self.run]):
            raise UnshowableError("it is a link that leads out of the run's folder")
        try:
            return read_file(self.path, _LARGEST_FILE)
        except ValueError as error:
            raise UnshowableError(str(error)) from error


@dataclass(frozen=True)
class PicturePair:
    """The same picture of both runs, None where a run has none."""

    name: str
    a: PictureFile | None
    b: PictureFile | None


@dataclass(frozen=True)
class Picture:
    """A picture that was read.

    Attributes:
        png: the file as it is; None where it is in a format that not every browser shows.
    """

    png: bytes | None
    pixels_HWC: Pixels


def read_picture(file: PictureFile, allowance: Allowance) -> Picture:
    """Raises UnshowableError where it is no picture, a link out of the run's folder, too large, or damaged."""
    content = file.content()
    try:
        # Whoever looks at the page is not to be warned of strange metadata in files that are shown all the same.
        with warnings.catch_warnings(action="ignore"), foreign_library("It cannot be decoded", "Copy it again."):
            return _decoded(content, allowance)
    except ValueError as error:
        raise UnshowableError(shown(error.__cause__)) from error


def _decoded(content: bytes, allowance: Allowance) -> Picture:
    with open_picture(content) as picture:
        check_pixels(*picture.size)
        allowance.spend_pixels(picture.width * picture.height)
        if 0 in picture.size:
            raise UnshowableError("it has no pixels")
        return Picture(content if picture.format == "PNG" else None, np.asarray(picture.convert("RGB")))


def difference(a_HWC: Pixels, b_HWC: Pixels) -> Pixels | None:
    """|a - b|, uint8 [H, W, 3]; None where they differ in size."""
    if a_HWC.shape != b_HWC.shape:
        return None
    difference_HWC = np.maximum(a_HWC, b_HWC)  # in 8 bits: the largest pictures have 270 MB
    difference_HWC -= np.minimum(a_HWC, b_HWC)
    return difference_HWC


def measure(difference_HWC: Pixels) -> PictureDifference:
    """The figures of what `difference` gives."""
    return PictureDifference(float(difference_HWC.mean(dtype=np.float64)), int(difference_HWC.max()))


def amplified(difference_HWC: Pixels) -> Pixels:
    """`AMPLIFICATION` times as bright, clipped."""
    darkest_clipped = 255 // AMPLIFICATION + 1
    bright_HWC = np.minimum(difference_HWC, darkest_clipped - 1)
    bright_HWC *= AMPLIFICATION
    bright_HWC[difference_HWC >= darkest_clipped] = 255
    return bright_HWC


def validation_steps(folder_a: Path, folder_b: Path) -> list[int]:
    """The steps at which either run made pictures, in order."""
    found = [
        _STEP_FOLDER.fullmatch(name) for run in (folder_a, folder_b) for name in _names_in(run / "validation", run)
    ]
    return sorted({int(match[1]) for match in found if match and int(match[1]) <= MOST_STEPS})


def validation_pairs(folder_a: Path, folder_b: Path, step: int) -> list[PicturePair]:
    """The pictures of a step, by name."""
    places = [(run, run / "validation" / f"step-{step}") for run in (folder_a, folder_b)]
    names = sorted({name for run, folder in places for name in _names_in(folder, run) if name.endswith(".png")})
    return [PicturePair(name, *(_existing(folder / name, run) for run, folder in places)) for name in names]


def contact_sheets(folder_a: Path, folder_b: Path) -> PicturePair | None:
    """The contact sheets, None if neither run has one."""
    pair = PicturePair(
        "contact_sheet.png", *(_existing(run / "contact_sheet.png", run) for run in (folder_a, folder_b))
    )
    return pair if pair.a or pair.b else None


def folders_leading_out(folder_a: Path, folder_b: Path) -> list[Path]:
    """Folders of pictures that are links out of their run's folder, and so are not looked into."""
    found = []
    for run in (folder_a, folder_b):
        validation = run / "validation"
        steps = [validation / name for name in sorted(_names_in(validation, run)) if _STEP_FOLDER.fullmatch(name)]
        found += [folder for folder in (validation, *steps) if folder.is_symlink() and not is_inside(folder, [run])]
    return found


def as_png(pixels_HWC: Pixels, allowance: Allowance) -> bytes:
    """Without loss."""
    picture, file = PIL.Image.fromarray(pixels_HWC), BytesIO()
    is_tight = picture.width * picture.height <= allowance.tight_pixels
    if is_tight:
        allowance.tight_pixels -= picture.width * picture.height
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def as_preview(pixels_HWC: Pixels) -> bytes:
    """A WebP file, compressed and at most 720 pixels wide: for the many that few people look at."""
    small, file = PIL.Image.fromarray(pixels_HWC), BytesIO()
    small.thumbnail((_PREVIEW_WIDTH, 16 * _PREVIEW_WIDTH))
    small.save(file, "WEBP", quality=85)
    return file.getvalue()


def _names_in(folder: Path, run: Path) -> list[str]:
    """Nothing where there is no such folder in the run's, or it may not be read."""
    if not is_inside(folder, [run]):
        return []
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _existing(path: Path, run: Path) -> PictureFile | None:
    # A link to nowhere, a pipe and a folder are there, and it is said why they are not shown.
    return PictureFile(path, run) if os.path.lexists(path) and is_inside(path.parent, [run]) else None
