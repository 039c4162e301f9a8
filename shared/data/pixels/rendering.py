"""What a batch shows of a picture.

Axes: Y X rows and columns of the part, C channels.
"""

import numpy as np
import numpy.typing as npt
import PIL.Image

from shared.data.pixels.decoding import Picture
from shared.data.pixels.resampling import resample


def render(
    picture: Picture,
    resized: tuple[int, int],
    box: tuple[int, int, int, int],
    flipped: bool,
    filter_: PIL.Image.Resampling,
    out_YXC: npt.NDArray[np.uint8],
) -> None:
    """Write a part of a resized picture: the pixels of PIL's `resize`, then `crop`.

    Args:
        picture: what is resized.
        resized: (width, height) of the whole after resizing.
        box: (left, top, right, bottom) of the part in it, which lies inside.
        flipped: whether the part is written mirrored, left for right.
        filter_: PIL's; the bilinear one is computed without Python's lock, and for that part only.
        out_YXC: uint8 [Y,X,C], contiguous, of 3 channels or as many as the picture; grey is repeated.
    """
    left, top, right, bottom = box
    if resized == picture.size:
        part = picture.pixels[top:bottom, left:right]
    elif filter_ == PIL.Image.Resampling.BILINEAR:
        resample(picture.pixels, resized, box, flipped, out_YXC)
        return
    else:
        part = np.asarray(picture.image.resize(resized, filter_).crop(box)).reshape(bottom - top, right - left, -1)
    _copy(part[:, ::-1] if flipped else part, out_YXC)


def _copy(part_YXC: npt.NDArray[np.uint8], out_YXC: npt.NDArray[np.uint8]) -> None:
    if part_YXC.shape == out_YXC.shape and part_YXC.strides[1:] == out_YXC.strides[1:]:
        out_YXC[:] = part_YXC
        return
    grey = part_YXC.shape[2] == 1
    for channel in range(out_YXC.shape[2]):  # numpy takes five times as long for lines of three bytes
        out_YXC[:, :, channel] = part_YXC[:, :, 0 if grey else channel]
