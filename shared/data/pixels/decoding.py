"""Opened pictures → pixels.

Axes: H height, W width, C channels.
"""

import numpy as np
import numpy.typing as npt
import PIL.Image
from PIL.PngImagePlugin import PngImageFile

from shared.data.pixels.png import plain_png


class Picture:
    """A decoded picture, upright, of 8 bits: RGB, or grey of one channel, which all three would be."""

    MODES = ("RGB", "L")

    def __init__(self, decoded: PIL.Image.Image | npt.NDArray[np.uint8]) -> None:
        """
        Args:
            decoded: of mode RGB or L, or uint8 [H,W,C] of as many channels.
        """
        self._decoded = decoded

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), as PIL has them."""
        if isinstance(self._decoded, PIL.Image.Image):
            return self._decoded.size
        return self._decoded.shape[1], self._decoded.shape[0]

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """uint8 [H,W,C], contiguous."""
        return np.asarray(self._decoded).reshape(self.height, self.width, -1)

    @property
    def image(self) -> PIL.Image.Image:
        """Of mode RGB or L."""
        if isinstance(self._decoded, PIL.Image.Image):
            return self._decoded
        return PIL.Image.fromarray(self._decoded[:, :, 0] if self._decoded.shape[2] == 1 else self._decoded)


def plain_pixels(opened: PIL.Image.Image) -> npt.NDArray[np.uint8] | None:
    """The pixels of an opened picture that need not be read by Pillow, as `plain_png` gives them.

    Of JPEG files there are none: Pillow decodes them without Python's lock, as fast as libjpeg-turbo by itself.
    """
    return plain_png(opened) if isinstance(opened, PngImageFile) else None
