"""The parameter layouts used here and PyTorch's.

Every `nnx.Param` names its layout; loading and saving ask here, and nowhere else, what that means.
"""

import numpy as np

CONV = "conv"  # WHIO here, OIHW in PyTorch
LINEAR = "linear"  # IO here, OI in PyTorch
PLAIN = "plain"  # the same in both


def from_torch_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """A view of a PyTorch-layout array in this project's layout: where it differs, all axes are in reverse order."""
    return array if layout == PLAIN else array.T


def to_torch_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """A view of one of our arrays in PyTorch's layout; the inverse of `from_torch_layout`."""
    return from_torch_layout(array, layout)


def torch_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape that an array of ours has in PyTorch."""
    return shape if layout == PLAIN else shape[::-1]
