"""Adam's moments in eight bits: which numbers share a scale, and the 256 values that a number may take.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861): a moment is divided into
blocks, each is stored as its largest absolute value and, for every number, the code of its share in that. The codes are
those of "dynamic" numbers, whose exponent takes the fewer bits the larger they are; bitsandbytes' `create_dynamic_map`
is the reference. The blocks are not bitsandbytes': it cuts PyTorch's memory into pieces of 256 numbers, here a block is
a piece of one axis, so that neither a TPU's memory layout nor a division between devices has to be undone for it.

Shapes are those of Flax's parameters: kernels WHIO, linear layers [in, out].
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SMALLEST = 4096
"""Elements of the smallest parameter whose moments are stored so: bitsandbytes' `min_8bit_size`."""

CODES = 256
DECADES = 7
"""Dynamic numbers lie in seven decades below 1; the one at 10⁻⁶ … 10⁻⁷ holds the fewest."""

_LARGEST_BLOCK = 256
_BITSANDBYTES_BLOCK = 256


class Blocks(NamedTuple):
    """How an array is cut up: along `axis` (counted from its end) into pieces of `size`.

    In a divided array, that is the axis of a block's numbers.
    """

    axis: int
    size: int

    def divided(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with the axis in two: pieces, and numbers in each."""
        axis = len(shape) + self.axis
        return (*shape[:axis], shape[axis] // self.size, self.size, *shape[axis + 1 :])

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the array that holds the scale of every block."""
        axis = len(shape) + self.axis
        return (*shape[:axis], shape[axis] // self.size, *shape[axis + 1 :])


def blocks_of(shape: tuple[int, ...]) -> Blocks | None:
    """The blocks of a parameter's moments, along the shorter of its two last axes; None where they stay in float32.

    A mesh divides the longer one between devices (`flax_trainer.distributed.mesh.spec_of`), so blocks stay whole.
    """
    if len(shape) < 2 or int(np.prod(shape)) < SMALLEST:
        return None
    axis = -2 if shape[-2] < shape[-1] else -1
    length = shape[axis]
    return Blocks(axis, max(size for size in range(1, min(length, _LARGEST_BLOCK) + 1) if length % size == 0))


def code_of_zero(*, signed: bool) -> int:
    """Half of the codes but one stand for negative numbers, where numbers have a sign."""
    return CODES // 2 - 1 if signed else 0


def code_values(*, signed: bool) -> npt.NDArray[np.float32]:
    """float32 [256], ascending, -1 < value ≤ 1: what each code stands for. First moments are signed, second are not."""
    positive: list[float] = []
    for decade in range(DECADES):
        count = 2 ** (decade if signed else decade + 1)
        edges = np.linspace(0.1, 1, count + 1)
        positive.extend(10.0 ** (decade - DECADES + 1) * (edges[:-1] + edges[1:]) / 2)
    values = [*positive, 0.0, 1.0, *([-value for value in positive] if signed else [])]
    return np.sort(np.array(values, np.float32))


def zero_moment(shape: tuple[int, ...], *, signed: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """What `quantised` makes of zeros, without looking at each of them."""
    blocks = blocks_of(shape)
    assert blocks is not None, shape
    return np.full(shape, code_of_zero(signed=signed), np.uint8), np.zeros(blocks.scales(shape), np.float32)


def dequantised(
    codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], *, signed: bool
) -> npt.NDArray[np.float32]:
    """A moment as float32, from how it is stored; the blocks are those that `blocks_of` gives for its shape."""
    blocks = blocks_of(codes.shape)
    assert blocks is not None, codes.shape
    values = code_values(signed=signed)[codes].reshape(blocks.divided(codes.shape))
    scaled: npt.NDArray[np.float32] = values * np.expand_dims(scales, blocks.axis)
    return scaled.reshape(codes.shape)


def quantised(
    moment: npt.NDArray[np.float32], *, signed: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """The nearest codes of a moment, uint8 of its shape, and the scales of its blocks."""
    blocks = blocks_of(moment.shape)
    assert blocks is not None, moment.shape
    divided = moment.reshape(blocks.divided(moment.shape))
    scales = np.abs(divided).max(axis=blocks.axis)
    shares = divided / np.expand_dims(np.where(scales > 0, scales, 1), blocks.axis)
    return _nearest(code_values(signed=signed), shares).reshape(moment.shape), scales


def from_bitsandbytes(
    state: Mapping[str, npt.NDArray[Any]], number: int, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """A moment (`number` 1 or 2) in float32 from what bitsandbytes keeps of a parameter of this shape.

    Raises:
        ValueError: it is something else.
    """
    codes, size = state.get(f"state{number}"), int(np.prod(shape))
    if codes is None or codes.shape != shape or codes.dtype not in (np.uint8, np.float32):
        raise ValueError(f"state{number} is not there, or is of another shape or type")
    if codes.dtype == np.float32:
        return codes
    values, scales = state.get(f"qmap{number}"), state.get(f"absmax{number}")
    blocks = -(-size // _BITSANDBYTES_BLOCK)
    if values is None or scales is None or (values.shape, scales.shape) != ((CODES,), (blocks,)):
        raise ValueError(f"qmap{number} or absmax{number} is not there, or is of another shape")
    shares, scale_of_each = values.astype(np.float32)[codes.reshape(-1)], np.repeat(scales, _BITSANDBYTES_BLOCK)[:size]
    return (shares * scale_of_each.astype(np.float32)).reshape(shape)


def to_bitsandbytes(moment: npt.NDArray[np.float32], number: int) -> dict[str, npt.NDArray[Any]]:
    """What bitsandbytes keeps of a moment (`number` 1 or 2), nearest codes: the inverse of `from_bitsandbytes`."""
    if moment.size < SMALLEST:
        return {f"state{number}": moment}
    values, blocks = code_values(signed=number == 1), -(-moment.size // _BITSANDBYTES_BLOCK)
    divided = np.zeros((blocks, _BITSANDBYTES_BLOCK), np.float32)
    divided.reshape(-1)[: moment.size] = moment.reshape(-1)
    scales = np.abs(divided).max(axis=1)
    codes = _nearest(values, divided / np.where(scales > 0, scales, 1)[:, None])
    return {
        f"state{number}": codes.reshape(-1)[: moment.size].reshape(moment.shape),
        f"qmap{number}": values,
        f"absmax{number}": scales,
    }


def _nearest(values: npt.NDArray[np.float32], shares: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    return np.searchsorted((values[:-1] + values[1:]) / 2, shares).astype(np.uint8)
