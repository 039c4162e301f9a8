"""Encoded image → uint8 pixels.

Axes: H height, W width, C channels, R the training resolution.
"""

import io
import struct
import zlib
from pathlib import Path

import aiohttp
import fsspec
import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps

from shared.data.sample import BadSampleError, EncodedImage

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

# What PIL's readers raise on damaged or hostile files; each was seen from one plugin or another.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
    PIL.Image.DecompressionBombWarning,
)


def preprocess(image: EncodedImage, resolution: int, interpolation: str) -> npt.NDArray[np.uint8]:
    """Decode, resize the shorter side to `resolution`, crop the centre. Images and conditions both go through this.

    Returns:
        uint8 [R,R,3], RGB, 0 to 255.

    Raises:
        BadSampleError: for an image that cannot be read, or is too large to be honest.
        ValueError: for an unknown interpolation mode.
    """
    return np.asarray(resize_and_crop(decode(image), resolution, interpolation))


def decode(image: EncodedImage) -> PIL.Image.Image:
    """Read an image as 8-bit RGB, turned upright by its EXIF orientation.

    16-bit grey images (depth maps) are scaled from 65535 to 255; PIL's own conversion would clip them to white.

    Raises:
        BadSampleError: for a file that is missing, damaged or not an image; for 32-bit images, whose range nothing
            tells; for more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (where PIL itself begins to warn of a
            decompression bomb).
    """
    try:
        with _open(image) as opened:
            _check_pixels(*opened.size)
            upright = PIL.ImageOps.exif_transpose(opened)
            return _to_rgb(upright)
    except _DECODING_ERRORS as error:
        raise BadSampleError(f"{_describe(image)} cannot be decoded: {error}") from error


def resize_and_crop(image: PIL.Image.Image, resolution: int, interpolation: str) -> PIL.Image.Image:
    """torchvision's `Resize(resolution, interpolation)` then `CenterCrop(resolution)` on PIL images, same rounding.

    Reference: torchvision 0.21, `transforms.functional._compute_resized_output_size` (the longer side is truncated)
    and `center_crop` (offsets rounded half to even).

    Raises:
        BadSampleError: when an extreme aspect ratio would make the resized image a decompression bomb.
        ValueError: for an unknown interpolation mode.
    """
    if interpolation not in INTERPOLATION_MODES:
        known = ", ".join(INTERPOLATION_MODES)
        raise ValueError(f"--image_interpolation_mode is {interpolation!r}; use one of {known}")
    width, height = resized_size(image.width, image.height, resolution)
    _check_pixels(width, height)
    resized = image.resize((width, height), INTERPOLATION_MODES[interpolation])
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    return resized.crop((left, top, left + resolution, top + resolution))


def resized_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) after the shorter side became `resolution`, the longer one truncated as torchvision does."""
    if width <= height:
        return resolution, int(resolution * height / width)
    return int(resolution * width / height), resolution


def _open(image: EncodedImage) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image.copy()  # the caller closes what it gets, and a drawn image belongs to its source
    if isinstance(image, bytes):
        return PIL.Image.open(io.BytesIO(image))
    if isinstance(image, str) and "://" in image:
        try:
            with fsspec.open(image, "rb") as file:
                return PIL.Image.open(io.BytesIO(file.read()))
        except aiohttp.ClientError as error:  # which is no OSError where the server refuses
            raise BadSampleError(f"it could not be downloaded ({type(error).__name__})") from error
    return PIL.Image.open(image)


def _describe(image: EncodedImage) -> str:
    return str(image) if isinstance(image, str | Path) else "an image"


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I;16"):
        grey_HW = np.asarray(image).astype(np.uint32)
        return PIL.Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadSampleError(f"it has 32-bit pixels (mode {image.mode}) of unknown range; save it with 8 or 16 bits")
    return image.convert("RGB")


def _check_pixels(width: int, height: int) -> None:
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise BadSampleError(f"it has {width}x{height} pixels, more than the {limit} allowed (a decompression bomb?)")
