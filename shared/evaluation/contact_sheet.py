"""The pictures that say what training does: held-out conditions, what is drawn for them, and what was asked for.

H height, W width of a picture in pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.evaluation.image_grid import GridRow, enlarge, save_grid

LEAST_SIDE = 192
"""Pixels to which smaller pictures are enlarged, to be looked at without a magnifier."""


class SheetRow(NamedTuple):
    """A caption and what belongs side by side below it: uint8 [H, W, 3] each."""

    caption: str
    pictures: Sequence[npt.NDArray[np.uint8]]


def save_sheet(path: Path, rows: Sequence[SheetRow], column_titles: Sequence[str]) -> None:
    """Write the rows as a PNG file under column titles; folders are made as needed.

    Raises:
        UserError: no rows, a picture that is not uint8 [H, W, 3], or more titles than columns.
    """
    grid = [GridRow(row.caption, [("", enlarge(picture, LEAST_SIDE)) for picture in row.pictures]) for row in rows]
    save_grid(path, grid, column_titles)
