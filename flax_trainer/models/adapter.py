"""One table between the parameter layouts used here and PyTorch's.

Every `nnx.Param` names its layout; loading and saving look its transposes up here and nowhere else.
"""

import numpy as np

CONV = "conv"  # HWIO here, OIHW in PyTorch
LINEAR = "linear"  # IO here, OI in PyTorch
PLAIN = "plain"  # the same in both

_FROM_TORCH = {CONV: (2, 3, 1, 0), LINEAR: (1, 0), PLAIN: None}
_TO_TORCH = {CONV: (3, 2, 0, 1), LINEAR: (1, 0), PLAIN: None}


def from_torch_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """A view of a PyTorch-layout array in this project's layout."""
    axes = _FROM_TORCH[layout]
    return array if axes is None else array.transpose(axes)


def to_torch_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """A view of one of our arrays in PyTorch's layout; the inverse of `from_torch_layout`."""
    axes = _TO_TORCH[layout]
    return array if axes is None else array.transpose(axes)


def torch_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape that an array of ours has in PyTorch."""
    axes = _TO_TORCH[layout]
    return shape if axes is None else tuple(shape[axis] for axis in axes)
