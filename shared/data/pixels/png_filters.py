"""The filters of PNG's rows, undone.

Reference: Portable Network Graphics (PNG) Specification, third edition (W3C 2025), 9 "Filtering".

Axes: H height; S bytes of a row.
"""

import numba
import numpy as np
import numpy.typing as npt

from shared.data.pixels.compiled import array, compiled

_i32 = np.int32
_u64 = np.uint64


def unfiltered(rows: npt.NDArray[np.uint8], channels: int) -> npt.NDArray[np.uint8] | None:
    """
    Args:
        rows: uint8 [H,1+S]: a row's filter, then what it made of the bytes.
        channels: of 8 bits each.

    Returns:
        uint8 [H,S], or None where a row has a filter that there is not.
    """
    pixels_HS = np.empty((rows.shape[0], rows.shape[1] - 1), np.uint8)
    return pixels_HS if _unfilter(rows, channels, pixels_HS) else None


@compiled(numba.boolean(array(np.uint8, 2, read_only=True), numba.int64, array(np.uint8, 2)))
def _unfilter(rows: npt.NDArray[np.uint8], channels: int, pixels_HS: npt.NDArray[np.uint8]) -> bool:
    """A byte is foretold from the same channel of the pixel to its left, of the one above, and of the one left of that.

    Outside of the picture they are zero. The file has what is to be added, modulo 256.
    """
    size, pixel = _u64(pixels_HS.shape[1]), _u64(channels)
    above = np.zeros(size, np.uint8)
    for row in range(_u64(pixels_HS.shape[0])):
        filter_, added, line = rows[row, 0], rows[row, 1:], pixels_HS[row]
        if filter_ == 0:
            line[:] = added
        elif filter_ == 1:
            line[:pixel] = added[:pixel]
            for byte in range(pixel, size):
                line[byte] = added[byte] + line[byte - pixel]
        elif filter_ == 2:
            for byte in range(size):
                line[byte] = added[byte] + above[byte]
        elif filter_ == 3:
            for byte in range(pixel):
                line[byte] = added[byte] + (above[byte] >> 1)
            for byte in range(pixel, size):
                line[byte] = added[byte] + ((_i32(line[byte - pixel]) + _i32(above[byte])) >> 1)
        elif filter_ == 4:
            for byte in range(pixel):
                line[byte] = added[byte] + above[byte]
            for byte in range(pixel, size):
                left, up, corner = _i32(line[byte - pixel]), _i32(above[byte]), _i32(above[byte - pixel])
                # Paeth's: whichever is nearest to left + up - corner; of equals the first in this order.
                to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - corner - corner)
                nearest = corner if to_up > to_corner else up
                line[byte] = added[byte] + (nearest if to_left > min(to_up, to_corner) else left)
        else:
            return False
        above = line
    return True
