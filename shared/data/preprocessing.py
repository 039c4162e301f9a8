"""Encoded image → uint8 pixels.

Axes: H height, W width, C channels, R the training resolution.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps

from shared.data.addresses import described, local_path, read_address, scheme_of
from shared.data.pixels import Picture, plain_pixels, render
from shared.data.sample import BadSampleError, EncodedImage
from shared.models.xl import Sizes
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


class Preprocessed(NamedTuple):
    """The pixels that are trained on, uint8 [R,R,3], RGB, 0 to 255, and the sizes of what they were cut from."""

    pixels: npt.NDArray[np.uint8]
    sizes: Sizes


def preprocess(
    image: EncodedImage, resolution: int, interpolation: str, out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Decode, resize the shorter side to `resolution`, crop the centre. Images and conditions both go through this.

    Args:
        image: what is decoded.
        resolution: of the square that is cut.
        interpolation: one of `INTERPOLATION_MODES`.
        out: a row of a batch to write to, uint8 [R,R,3], contiguous; a new array where it is None.

    Returns:
        uint8 [R,R,3], RGB, 0 to 255: PIL's pixels to within 1, and always the same ones.

    Raises:
        BadSampleError: for an image that cannot be read, or is too large to be honest.
        UserError: for an unknown interpolation mode.
    """
    return preprocess_with_sizes(image, resolution, interpolation, out).pixels


def preprocess_with_sizes(
    image: EncodedImage, resolution: int, interpolation: str, out: npt.NDArray[np.uint8] | None = None
) -> Preprocessed:
    """As `preprocess`, saying too what was done: Podell et al. 2023 (SDXL), section 2.2, conditions on it.

    The original is counted upright and before it is resized, the crop in the resized image, as diffusers'
    `train_text_to_image_sdxl.py` does it with a centre crop.
    """
    picture = decode_picture(image)
    pixels = np.empty((resolution, resolution, 3), np.uint8) if out is None else out
    left, top = _resize_and_crop(picture, interpolation, pixels)
    return Preprocessed(pixels, (picture.height, picture.width, top, left, resolution, resolution))


def decode_picture(image: EncodedImage) -> Picture:
    """As `decode`, for `render`: grey pictures stay grey, and much of it runs without Python's lock."""
    return _read(image, _picture)


def decode(image: EncodedImage) -> PIL.Image.Image:
    """Read an image as 8-bit RGB, turned upright by its EXIF orientation.

    16-bit grey images (depth maps) are scaled from 65535 to 255; PIL's own conversion would clip them to white.

    Raises:
        BadSampleError: for a file that is missing, damaged, no file, or not of a format in
            `shared.untrusted.pictures.FORMATS`; for 32-bit images, whose range nothing tells; for more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels (where PIL itself begins to warn of a decompression bomb).
    """
    return _read(image, _upright_rgb)


def resize_and_crop(image: PIL.Image.Image, height: int, width: int, interpolation: str) -> PIL.Image.Image:
    """An image of mode RGB or L, resized until it covers `height` and `width`, then cropped at its centre: in RGB.

    For squares that is torchvision's `Resize(resolution, interpolation)` then `CenterCrop(resolution)`, same rounding.
    Reference: torchvision 0.21, `transforms.functional._compute_resized_output_size` (the longer side is truncated)
    and `center_crop` (offsets rounded half to even).

    Raises:
        BadSampleError: when an extreme aspect ratio would make the resized image a decompression bomb.
        UserError: for an unknown interpolation mode.
    """
    picture = Picture(image)
    pixels = np.empty((height, width, 3), np.uint8)
    _resize_and_crop(picture, interpolation, pixels)
    return PIL.Image.fromarray(pixels)


def resized_size(width: int, height: int, wanted_width: int, wanted_height: int) -> tuple[int, int]:
    """(width, height) after one side is as wanted and the other at least so, truncated as torchvision does."""
    if width * wanted_height <= height * wanted_width:
        return wanted_width, int(wanted_width * height / width)
    return int(wanted_height * width / height), wanted_height


def crop_corner(width: int, height: int, wanted_width: int, wanted_height: int) -> tuple[int, int]:
    """(left, top) of the centre crop of a resized image, halves rounded to even as torchvision does."""
    return round((width - wanted_width) / 2), round((height - wanted_height) / 2)


def _resize_and_crop(picture: Picture, interpolation: str, out: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """(left, top) of the crop that was written, uint8 [H,W,3]."""
    if interpolation not in INTERPOLATION_MODES:
        known = ", ".join(INTERPOLATION_MODES)
        raise UserError(f"--image_interpolation_mode is {interpolation!r}; use one of {known}")
    height, width, _ = out.shape
    resized = resized_size(*picture.size, width, height)
    _check_pixels(*resized)
    left, top = crop_corner(*resized, width, height)
    box = (left, top, left + width, top + height)
    render(picture, resized, box, False, INTERPOLATION_MODES[interpolation], out)
    return left, top


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


def _upright_rgb(opened: PIL.Image.Image) -> PIL.Image.Image:
    return _to_rgb(PIL.ImageOps.exif_transpose(opened))


def _picture(opened: PIL.Image.Image) -> Picture:
    if (pixels := plain_pixels(opened)) is not None:
        return Picture(pixels)
    PIL.ImageOps.exif_transpose(opened, in_place=True)
    return Picture(opened if opened.mode in Picture.MODES else _to_rgb(opened))


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


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I;16"):
        grey_HW = np.asarray(image).astype(np.uint32)
        return PIL.Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadSampleError(f"it has 32-bit pixels (mode {image.mode}) of unknown range; save it with 8 or 16 bits")
    return image.convert("RGB")


def _check_pixels(width: int, height: int) -> None:
    try:
        check_pixels(width, height)
    except ValueError as error:
        raise BadSampleError(str(error)) from None
