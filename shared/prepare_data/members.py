"""A sample as the members of a shard: pictures as they were, or resized; what a training makes of them is the same.

H height, W width of a picture in pixels.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image

from shared.data.addresses import local_path, read_address, scheme_of
from shared.data.conditions import conditions_in
from shared.data.decoded_pairs import PairDecoder
from shared.data.preprocessing import decode, preprocess
from shared.data.sample import EncodedImage, RawSample
from shared.data.sources.shard_keys import condition_members
from shared.prepare_data.options import PackingOptions
from shared.untrusted import read_file
from shared.untrusted.pictures import LARGEST_FILE, open_picture

# Those of Pillow's formats that are stored as they are, with an extension that is found by itself; others become PNG.
_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}

IMAGES, CONDITIONS = "image.", "conditioning_image"
"""Beginnings of the extensions, whatever the format and however many."""

(CONDITION,) = condition_members(1)

Members = dict[str, bytes]
"""By extension. They are found without --shards_…_key, unless there are several conditions."""


@dataclass(frozen=True)
class Storing:
    """How pictures are stored.

    Attributes:
        resized: decodes, resizes and crops pairs as a training does; None to store pictures as they are.
        jpeg_quality: of resized images, None for PNG.
    """

    resized: PairDecoder | None
    jpeg_quality: int | None


def members_of(sample: RawSample, storing: Storing) -> Members:
    """The sample's image, conditions and captions.

    Raises:
        BadSampleError: a part is missing or cannot be decoded; or, of those that are resized, image and condition are
            of different shapes, and such pairs are to be skipped.
    """
    if storing.resized is not None:
        pair = storing.resized(sample)
        assert pair.pixels is not None
        count = len(sample.conditioning_images)
        conditions = conditions_in(pair.conditioning_pixels, (3,) * count)
        pictures = image_member(pair.pixels, storing.jpeg_quality)
        pictures |= zip(condition_members(count), map(png, conditions), strict=True)
        return pictures | caption_member(sample.captions)
    sample.check()
    return {
        **_image_as_it_is(sample.picture),
        **_conditions_as_they_are(sample.conditions),
        **caption_member(sample.captions),
    }


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """uint8 [H,W,C] or [H,W] as a PNG file; in one channel where all are the same."""
    picture = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    return _png(picture if picture.mode == "L" else _in_one_channel(picture) or picture)


def image_member(pixels_HWC: npt.NDArray[np.uint8], jpeg_quality: int | None) -> Members:
    """The image alone, resized already."""
    picture = PIL.Image.fromarray(pixels_HWC)
    if jpeg_quality is None:
        return {"image.png": _png(picture)}
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=jpeg_quality)
    return {"image.jpg": file.getvalue()}


class StoredImage(NamedTuple):
    """An image alone, as it is stored, and what is seen there: uint8 [H,W,3]."""

    members: Members
    pixels_HWC: npt.NDArray[np.uint8]


def stored_image(image: EncodedImage, options: PackingOptions) -> StoredImage:
    """The image as it is, or resized as the options say. BadSampleError where it cannot be decoded."""
    if options.resolution is None:
        return StoredImage(_image_as_it_is(image), np.asarray(decode(image)))
    pixels_HWC = preprocess(image, options.resolution, options.image_interpolation_mode)
    return StoredImage(image_member(pixels_HWC, options.jpeg_quality), pixels_HWC)


def _image_as_it_is(image: EncodedImage) -> Members:
    """The image alone. BadSampleError where it cannot be decoded."""
    extension, content = _as_it_is(image)
    return {f"image.{extension}": content}


def _conditions_as_they_are(conditions: Sequence[EncodedImage]) -> Members:
    """Without loss; several are PNG in any case, so that each has one name in all samples."""
    if len(conditions) == 1:
        extension, content = _condition_as_it_is(conditions[0])
        return {f"conditioning_image.{extension}": content}
    stored = map(_condition_as_it_is, conditions)
    contents = (content if extension == "png" else _png(decode(content)) for extension, content in stored)
    return dict(zip(condition_members(len(conditions)), contents, strict=True))


def _condition_as_it_is(condition: EncodedImage) -> tuple[str, bytes]:
    """(extension, content): in one channel where all three are the same and that takes fewer bytes."""
    extension, content = _as_it_is(condition)
    grey = _in_one_channel(decode(content))
    if grey is not None and len(smaller := _png(grey)) < len(content):
        return "png", smaller
    return extension, content


def caption_member(captions: tuple[str, ...]) -> Members:
    """The captions alone."""
    # Plain text is read without the blanks around it.
    if len(captions) == 1 and captions[0] == captions[0].strip():
        return {"text.txt": captions[0].encode()}
    return {"text.json": json.dumps(captions, ensure_ascii=False).encode()}


def _as_it_is(image: EncodedImage) -> tuple[str, bytes]:
    """(extension, content) of a picture that can be decoded."""
    decoded = decode(image)
    if not isinstance(image, PIL.Image.Image):
        content = _content(image)
        with open_picture(content) as opened:
            extension = _EXTENSIONS.get(str(opened.format))
        if extension is not None:
            return extension, content
    return "png", _png(decoded)


def _content(image: bytes | Path | str) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str) and scheme_of(image) is not None:
        return read_address(image)
    return read_file(local_path(image) if isinstance(image, str) else image, LARGEST_FILE)


def _in_one_channel(picture: PIL.Image.Image) -> PIL.Image.Image | None:
    """An RGB picture as a grey one; None where it has colours."""
    pixels_HWC = np.asarray(picture)
    first_HW = pixels_HWC[..., 0]
    if np.array_equal(first_HW, pixels_HWC[..., 1]) and np.array_equal(first_HW, pixels_HWC[..., 2]):
        return PIL.Image.fromarray(first_HW)
    return None


def _png(picture: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
