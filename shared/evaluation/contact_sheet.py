"""The picture that says what training did: held-out conditions, drawn before and after, beside what was asked for.

H height, W width of a picture in pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.images import GridRow, enlarge, save_grid

COLUMN_TITLES = ("condition", "before training", "after training", "ground truth")
LEAST_SIDE = 192
"""Pixels to which smaller pictures are enlarged, to be looked at without a magnifier."""


class SheetRow(NamedTuple):
    """A held-out condition with its caption and the pictures of it: uint8 [H, W, 3] each."""

    caption: str
    condition: npt.NDArray[np.uint8]
    before: npt.NDArray[np.uint8]
    after: npt.NDArray[np.uint8]
    ground_truth: npt.NDArray[np.uint8]


def save_contact_sheet(path: Path, rows: Sequence[SheetRow]) -> None:
    """Write the rows as a PNG file under column titles, each below its caption; folders are made as needed.

    Raises:
        ValueError: no rows, or a picture that is not uint8 [H, W, 3].
    """
    grid = [
        GridRow(caption, [("", enlarge(picture, LEAST_SIDE)) for picture in pictures]) for caption, *pictures in rows
    ]
    save_grid(path, grid, COLUMN_TITLES)
