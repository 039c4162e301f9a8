"""Pillow's bilinear resizing of the part that is kept, bit for bit.

Reference: Pillow, `src/libImaging/Resample.c`. Columns are resampled first and rounded to 8 bits, then rows. A triangle
filter, widened by the scale where the picture shrinks, gives the weights: computed and normalised in double precision,
then rounded to integers of 22 fractional bits, with which the pixels are summed. Pillow 13 begins with the rows where
that is less work; here the order is always the same, so that no version of Pillow changes a batch, and no pixel is more
than 1 of 255 away from any.

Axes: H height, W width, C channels of the picture; Y X rows and columns of the part; K pixels under the filter;
S rows of a strip.
"""

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from shared.data.pixels.compiled import array, compiled

_FRACTION = 32 - 8 - 2  # Pillow's PRECISION_BITS
_HALF = np.int32(1 << (_FRACTION - 1))
_STRIP_BYTES = 64  # of one column of a strip: a cache line, and the widest register

_u64 = np.uint64


def resample(
    pixels_HWC: npt.NDArray[np.uint8],
    resized: tuple[int, int],
    box: tuple[int, int, int, int],
    flipped: bool,
    out_YXC: npt.NDArray[np.uint8],
) -> None:
    """Write a part of a resized picture.

    Args:
        pixels_HWC: uint8 [H,W,C], contiguous, grey or RGB: of 1 channel or 3.
        resized: (width, height) of the whole after resizing.
        box: (left, top, right, bottom) of the part in it, which lies inside.
        flipped: whether the part is written mirrored, left for right.
        out_YXC: uint8 [Y,X,C], contiguous, of 3 channels or as many as the picture; grey is repeated.
    """
    (height, width, channels), (left, top, right, bottom) = pixels_HWC.shape, box
    assert out_YXC.shape[:2] == (bottom - top, right - left)
    assert channels in (1, 3)
    assert out_YXC.shape[2] in (3, channels)
    assert 0 <= left < right <= resized[0]
    assert 0 <= top < bottom <= resized[1]
    first_X, weights_XK = _weights(width, resized[0], left, right - left, _taps(width, resized[0]))
    first_Y, weights_YK = _weights(height, resized[1], top, bottom - top, _taps(height, resized[1]))

    used = slice(int(first_Y[0]), int(first_Y[-1]) + weights_YK.shape[1])
    # The channels of a pixel travel together, as one integer.
    narrowed_HX = np.empty((used.stop - used.start, right - left), np.uint8 if channels == 1 else np.uint32)
    _resample_columns(pixels_HWC[used], first_X, weights_XK, narrowed_HX)
    _resample_rows(narrowed_HX.view(np.uint8), first_Y - used.start, weights_YK, flipped, out_YXC)


def _taps(size: int, resized: int) -> int:
    """How many pixels the filter covers at most."""
    return min(size, 2 * math.ceil(max(size / resized, 1.0)) + 1)


@compiled(
    numba.types.Tuple((array(np.int64, 1), array(np.int32, 2)))(
        numba.int64, numba.int64, numba.int64, numba.int64, numba.int64
    )
)
def _weights(
    size: int, resized: int, first: int, count: int, taps: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Of `count` pixels from `first` on: the first pixel under the filter, and the weights of that and the next ones.

    All have as many, some of them zero, and none lies outside of the picture.
    """
    scale = size / resized
    support = max(scale, 1.0)
    inverse = 1.0 / support
    starts = np.empty(count, np.int64)
    weights = np.zeros((count, taps), np.int32)
    triangle = np.empty(taps)
    for index in range(count):
        centre = (first + index + 0.5) * scale
        begin = max(int(centre - support + 0.5), 0)
        end = min(int(centre + support + 0.5), size)
        total = 0.0
        for tap in range(end - begin):
            weight = max(0.0, 1.0 - abs((tap + begin - centre + 0.5) * inverse))
            triangle[tap] = weight
            total += weight
        start = min(begin, size - taps)
        for tap in range(end - begin):
            weights[index, tap + begin - start] = np.int32(0.5 + triangle[tap] / total * (1 << _FRACTION))
        starts[index] = start
    return starts, weights


@compiled(
    *(
        numba.void(array(np.uint8, 3, read_only=True), array(np.int64, 1), array(np.int32, 2), array(pixel, 2))
        for pixel in (np.uint8, np.uint32)
    )
)
def _resample_columns(
    pixels_HWC: npt.NDArray[np.uint8],
    first_X: npt.NDArray[np.int64],
    weights_XK: npt.NDArray[np.int32],
    result_HX: npt.NDArray[Any],
) -> None:
    """[H,W,C] → [H,X] of bytes, or of integers of which three bytes are a pixel's.

    In strips of rows, transposed: then one weight is for bytes that lie side by side, and registers take many at once.
    """
    height, width, channels = pixels_HWC.shape
    rows = _STRIP_BYTES // result_HX.itemsize
    strip_WS = np.zeros((width, rows), result_HX.dtype)
    result_XS = np.empty((result_HX.shape[1], rows), result_HX.dtype)
    strip_bytes, result_bytes = strip_WS.view(np.uint8), result_XS.view(np.uint8)
    sums = np.empty(_STRIP_BYTES, np.int32)
    for top in range(0, height, rows):
        used = min(rows, height - top)
        for row in range(_u64(used)):
            line = pixels_HWC[_u64(top) + row]
            for column in range(_u64(width)):
                pixel = np.uint32(line[column, 0])
                if channels == 3:
                    pixel |= (np.uint32(line[column, 1]) << np.uint32(8)) | (
                        np.uint32(line[column, 2]) << np.uint32(16)
                    )
                strip_WS[column, row] = pixel
        for column in range(_u64(first_X.size)):
            sums[:] = _HALF
            for tap in range(_u64(weights_XK.shape[1])):
                weight = weights_XK[column, tap]
                under = strip_bytes[_u64(first_X[column]) + tap]
                for byte in range(_u64(_STRIP_BYTES)):
                    sums[byte] = np.int32(sums[byte] + np.int32(under[byte]) * weight)
            for byte in range(_u64(_STRIP_BYTES)):
                result_bytes[column, byte] = sums[byte] >> _FRACTION
        for row in range(_u64(used)):
            written = result_HX[_u64(top) + row]
            for column in range(_u64(first_X.size)):
                written[column] = result_XS[column, row]


@compiled(
    numba.void(
        array(np.uint8, 2, read_only=True),
        array(np.int64, 1),
        array(np.int32, 2),
        numba.boolean,
        array(np.uint8, 3),
    )
)
def _resample_rows(
    lines: npt.NDArray[np.uint8],
    first_Y: npt.NDArray[np.int64],
    weights_YK: npt.NDArray[np.int32],
    flipped: bool,
    out_YXC: npt.NDArray[np.uint8],
) -> None:
    """[H,X·1] of grey or [H,X·4] of packed pixels → [Y,X,C]."""
    length = _u64(lines.shape[1])
    width, channels = out_YXC.shape[1:]
    grey = lines.shape[1] == width
    sums = np.empty(length, np.int32)
    for row in range(_u64(len(out_YXC))):
        sums[:] = _HALF
        for tap in range(_u64(weights_YK.shape[1])):
            weight = weights_YK[row, tap]
            line = lines[_u64(first_Y[row]) + tap]
            for byte in range(length):
                sums[byte] = np.int32(sums[byte] + np.int32(line[byte]) * weight)
        written = out_YXC[row]
        for column in range(_u64(width)):
            place = _u64(width) - _u64(1) - column if flipped else column
            first, step = (column, _u64(0)) if grey else (_u64(4) * column, _u64(1))
            written[place, 0] = sums[first] >> _FRACTION
            if channels == 3:
                written[place, 1] = sums[first + step] >> _FRACTION
                written[place, 2] = sums[first + step + step] >> _FRACTION
