"""Several conditions of one sample, side by side in channels.

Axes: H height, W width, N channels of all conditions, C of one.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Item = TypeVar("Item")


def conditions_in(pixels_HWN: npt.NDArray[np.uint8], channels: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
    """Each condition [H,W,C] of as many channels as are told of it, in their order."""
    assert pixels_HWN.shape[-1] == sum(channels)
    return np.split(pixels_HWN, np.cumsum(channels)[:-1], axis=-1)


def in_turn(items: Sequence[Item], conditions: int) -> list[tuple[Item, ...]]:
    """Groups of one item of each condition, of items that come one of each in turn."""
    return [tuple(items[start : start + conditions]) for start in range(0, len(items), conditions)]


def numbered_conditions(count: int) -> list[str]:
    """What people read over or under the conditions: "condition", or "condition 1" and so on."""
    return ["condition"] if count == 1 else [f"condition {number}" for number in range(1, count + 1)]
