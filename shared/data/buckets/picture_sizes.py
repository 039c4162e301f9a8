"""How large the pictures of a data set are, told from their headers.

Axes: N samples.
"""

import logging
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import TiffImageFile
from tqdm import tqdm

from shared.data.addresses import local_path, read_address, scheme_of
from shared.data.sample import EncodedImage
from shared.data.sources.base import RandomAccessSource, TellsHeaders, header_at, image_at
from shared.data.views import Size
from shared.data.workers import Workers
from shared.untrusted import foreign_library
from shared.untrusted.pictures import check_pixels, opened_header

logger = logging.getLogger(__name__)

_LYING = (5, 6, 7, 8)  # EXIF's orientations of pictures that are turned by a quarter
_AT_ONCE = 64  # pictures that a thread looks at before the bar moves


def picture_sizes(source: RandomAccessSource, threads: int) -> npt.NDArray[np.int32]:
    """int32 [N,2], width and height of each sample's image, upright; 0 where its header tells none.

    Raises:
        UserError: the data cannot be read any further.
    """
    sizes_N2 = np.zeros((len(source), 2), np.int32)
    workers = Workers(threads)
    try:
        # Asked here, for the bar is this thread's.
        begins = range(0, len(source), _AT_ONCE)
        parts: list[Future[None]] = [workers.submit(partial(_look, source, begin, sizes_N2)) for begin in begins]
        with _bar(len(source)) as bar:
            for part in parts:
                part.result()
                bar.update(min(_AT_ONCE, len(source) - bar.n))
    finally:
        workers.close()
    return sizes_N2


def upright_size(image: EncodedImage) -> Size | None:
    """(width, height) of a picture as it is decoded, of its header alone; None where that is damaged or dishonest.

    A PNG file that tells only behind its pixels that it lies is taken as it lies.
    """
    try:
        # What PIL raises on damaged or hostile files is anything, and `decode` will say what is wrong.
        with foreign_library("", ""):
            return _size(image)
    except (ValueError, MemoryError):
        return None


def _size(image: EncodedImage) -> Size:
    if isinstance(image, PIL.Image.Image):
        return _upright(image)
    if isinstance(image, str):
        image = Path(local_path(image)) if scheme_of(image) is None else read_address(image)
    with opened_header(image) as opened:
        check_pixels(*opened.size)
        return _upright(opened)


def _upright(picture: PIL.Image.Image) -> Size:
    if isinstance(picture, TiffImageFile):  # whose size is that of the upright picture already
        return picture.size
    # Of a PNG file, its own `getexif` would decode the picture first.
    orientation = PIL.Image.Image.getexif(picture).get(Base.Orientation)
    width, height = picture.size
    return (height, width) if orientation in _LYING else (width, height)


def _look(source: RandomAccessSource, begin: int, sizes_N2: npt.NDArray[np.int32]) -> None:
    for index in range(begin, min(begin + _AT_ONCE, len(source))):
        sizes_N2[index] = _size_at(source, index) or (0, 0)


def _size_at(source: RandomAccessSource, index: int) -> Size | None:
    header = header_at(source, index)
    size = None if header is None else upright_size(header)
    if size is None and header is not None and isinstance(source, TellsHeaders):
        whole = image_at(source, index)  # the header may be longer than most
        size = None if whole is None else upright_size(whole)
    return size


def _bar(total: int) -> "tqdm[Any]":
    shows = logger.isEnabledFor(logging.INFO)  # processes that only work along log nothing but errors
    return tqdm(total=total, desc="sizes of pictures", unit="picture", disable=not shows)
