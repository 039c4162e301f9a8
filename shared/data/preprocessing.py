"""Encoded image → uint8 pixels.

Axes: H height, W width, C channels, R the training resolution.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps

from shared.data.addresses import described, local_path, read_address, scheme_of
from shared.data.pixels import Picture, plain_pixels, render
from shared.data.sample import BadSampleError, EncodedImage
from shared.data.views import View, view_of
from shared.untrusted import foreign_library, shown
from shared.untrusted.pictures import check_pixels, open_picture
from shared.user_errors import UserError

INTERPOLATION_MODES = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "nearest_exact": PIL.Image.Resampling.NEAREST,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "box": PIL.Image.Resampling.BOX,
    "hamming": PIL.Image.Resampling.HAMMING,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}
"""torchvision's names for PIL's filters. PIL has one nearest filter, which torchvision uses for both of its own."""


Decoded = TypeVar("Decoded")

MODES = {1: "L", 3: "RGB"}
"""PIL's mode of pictures, by their channels."""


def preprocess(image: EncodedImage, resolution: int, interpolation: str, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Decode, resize the shorter side to `resolution`, crop the centre.

    Returns:
        uint8 [R,R,C], 0 to 255: RGB, or grey of one channel; PIL's pixels to within 1, and always the same ones.

    Raises:
        BadSampleError: for an image that cannot be read, or is too large to be honest.
        UserError: for an unknown interpolation mode.
    """
    picture = decode_picture(image, channels)
    return rendered(picture, view_of(picture.size, (resolution, resolution)), interpolation, channels)


def decode_picture(image: EncodedImage, channels: int = 3) -> Picture:
    """As `decode`, for `rendered`: grey pictures stay grey, and much of it runs without Python's lock."""
    return _read(image, partial(_picture, channels=channels))


def decode(image: EncodedImage, channels: int = 3) -> PIL.Image.Image:
    """Read an image as 8-bit RGB, or 8-bit grey of one channel, turned upright by its EXIF orientation.

    16-bit grey images (depth maps) are scaled from 65535 to 255; PIL's own conversion would clip them to white.

    Raises:
        BadSampleError: for a file that is missing, damaged, no file, or not of a format in
            `shared.untrusted.pictures.FORMATS`; for 32-bit images, whose range nothing tells; for more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels (where PIL itself begins to warn of a decompression bomb).
    """
    return _read(image, partial(_upright, mode=MODES[channels]))


def rendered(
    picture: Picture, view: View, interpolation: str, channels: int = 3, out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """What a view shows of a decoded picture.

    Where it is cropped at its centre to a square, that is torchvision's `Resize(resolution, interpolation)` then
    `CenterCrop(resolution)`, same rounding. Reference: torchvision 0.21, `transforms.functional.
    _compute_resized_output_size` (the longer side is truncated) and `center_crop` (offsets rounded half to even).

    Args:
        picture: of `channels`, or grey.
        view: the part that is shown.
        interpolation: one of `INTERPOLATION_MODES`.
        channels: C.
        out: a row of a batch to write to, uint8 [H,W,C], contiguous; a new array where it is None.

    Returns:
        uint8 [H,W,C], 0 to 255.

    Raises:
        BadSampleError: when an extreme aspect ratio would make the resized image a decompression bomb.
        UserError: for an unknown interpolation mode.
    """
    if interpolation not in INTERPOLATION_MODES:
        known = ", ".join(INTERPOLATION_MODES)
        raise UserError(f"--image_interpolation_mode is {interpolation!r}; use one of {known}")
    _check_pixels(*view.resized)
    width, height = view.size
    pixels = np.empty((height, width, channels), np.uint8) if out is None else out
    render(picture, view.resized, view.box, view.flipped, INTERPOLATION_MODES[interpolation], pixels)
    return pixels


def _read(image: EncodedImage, read: Callable[[PIL.Image.Image], Decoded]) -> Decoded:
    try:
        # What PIL raises on damaged or hostile files is anything, from one plugin or another.
        with foreign_library("", ""), _open(image) as opened:
            _check_pixels(*opened.size)
            return read(opened)
    except ValueError as error:
        cause = error.__cause__
        if isinstance(cause, BadSampleError):
            raise cause from None
        raise BadSampleError(_undecodable(image, cause)) from cause
    except MemoryError as error:
        raise BadSampleError(f"{_describe(image)} cannot be decoded: there is not enough memory for it") from error


def _upright(opened: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    return _converted(PIL.ImageOps.exif_transpose(opened), mode)


def _picture(opened: PIL.Image.Image, channels: int) -> Picture:
    as_it_is = Picture.MODES if channels == 3 else ("L",)
    if opened.mode in as_it_is and (pixels := plain_pixels(opened)) is not None:
        return Picture(pixels)
    PIL.ImageOps.exif_transpose(opened, in_place=True)
    return Picture(opened if opened.mode in as_it_is else _converted(opened, MODES[channels]))


def _open(image: EncodedImage) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image.copy()  # the caller closes what it gets, and a drawn image belongs to its source
    if isinstance(image, str):
        return open_picture(Path(local_path(image)) if scheme_of(image) is None else read_address(image))
    return open_picture(image)


def _describe(image: EncodedImage) -> str:
    if isinstance(image, str):
        return described(image)
    return shown(image) if isinstance(image, Path) else "an image"


def _undecodable(image: EncodedImage, error: BaseException | None) -> str:
    named, reason = _describe(image), shown(error) or type(error).__name__
    return reason if reason.startswith(named) else f"{named} cannot be decoded: {reason}"


def _converted(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    if image.mode.startswith("I;16"):
        grey_HW = np.asarray(image).astype(np.uint32)
        return PIL.Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8)).convert(mode)
    if image.mode in ("I", "F"):
        raise BadSampleError(f"it has 32-bit pixels (mode {image.mode}) of unknown range; save it with 8 or 16 bits")
    return image.convert(mode)


def _check_pixels(width: int, height: int) -> None:
    try:
        check_pixels(width, height)
    except ValueError as error:
        raise BadSampleError(str(error)) from None
