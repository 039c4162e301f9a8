"""The condition images of pictures: their files, and what is read or made of them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

from shared.config import TrainConfig
from shared.config.validation import check_whole_groups
from shared.data.conditions import in_turn
from shared.data.pixels import Picture
from shared.data.preprocessing import MODES, decode, rendered
from shared.data.sample import BadSampleError
from shared.data.views import view_of
from shared.generate.options import GenerateConfig
from shared.prepare_data.conditions import TypicalDraws, make_condition
from shared.prepare_data.options import ComputedCondition
from shared.untrusted import shown
from shared.user_errors import UserError

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".ppm", ".avif", ".jp2")
_MOST_CONDITIONS = 1000  # they are held in memory: 3 GiB at 1024 px


class ConditionKind(NamedTuple):
    """One of the conditions of a picture.

    Attributes:
        channels: 3 for colours, 1 for grey.
        interpolation: by which its images are resized.
        annotation: what is made of a photograph; None where the image is the condition.
    """

    channels: int
    interpolation: str
    annotation: ComputedCondition | None = None


def condition_files(config: GenerateConfig) -> list[list[Path]]:
    """Of each word the file that it names, or the pictures in a folder, in the order of their names.

    Raises:
        UserError: there is no such file or folder, no picture in a folder, or more than are held in memory.
    """
    files: list[list[Path]] = []
    for name in config.conditioning_image or ():
        path = Path(name)
        if os.path.isdir(path):
            files.append(_pictures_in(path))
        elif os.path.lexists(path):
            files.append([path])
        else:
            raise UserError(
                f"--conditioning_image: there is no file {shown(path)}. Give paths of existing images, or a folder."
            )
    count = sum(map(len, files))
    if count > _MOST_CONDITIONS:
        raise UserError(
            f"--conditioning_image comes to {count} images, more than the {_MOST_CONDITIONS} that are held in "
            "memory. Give them in several parts, each with its own --output_dir."
        )
    return files


def grouped(files: Sequence[Sequence[Path]], conditions: int) -> list[tuple[Path, ...]]:
    """Groups of one file of each condition, which the words name in turn.

    Args:
        files: of each word, as `condition_files` has them.
        conditions: how many there are.

    Raises:
        UserError: the words make up no whole groups, or the folders of one hold different numbers of pictures.
    """
    check_whole_groups("conditioning_image", len(files), conditions)
    groups: list[tuple[Path, ...]] = []
    for words in in_turn(files, conditions):
        counts = [len(of_one) for of_one in words]
        if len(set(counts)) > 1:
            raise UserError(
                f"--conditioning_image names {' and '.join(map(str, counts))} pictures for conditions that belong "
                "together: give folders of as many pictures, whose names are in the same order."
            )
        groups += zip(*words, strict=True)
    return groups


def read_conditions(paths: Sequence[Path], kinds: Sequence[ConditionKind], height: int, width: int) -> np.ndarray:
    """uint8 [H,W,N], one picture of each condition side by side, as `as_conditions` has them.

    Raises:
        UserError: one cannot be read.
    """
    return np.concatenate(
        [_read_condition(path, kind, height, width) for path, kind in zip(paths, kinds, strict=True)], axis=-1
    )


def as_conditions(
    pictures: Sequence[PIL.Image.Image], kinds: Sequence[ConditionKind], height: int, width: int
) -> np.ndarray:
    """uint8 [H,W,N], one picture of each condition side by side: resized until they cover the picture, then cropped at
    the centre, as in training; a photograph then becomes its condition.

    Raises:
        UserError: one has too many pixels on the way.
    """
    try:
        return np.concatenate(
            [_as_condition(picture, kind, height, width) for picture, kind in zip(pictures, kinds, strict=True)],
            axis=-1,
        )
    except BadSampleError as error:
        raise UserError(str(error)) from error


def _read_condition(path: Path, kind: ConditionKind, height: int, width: int) -> np.ndarray:
    try:
        picture = decode(path, kind.channels if kind.annotation is None else 3)
        return _as_condition(picture, kind, height, width)
    except (BadSampleError, UserError) as error:
        raise UserError(
            f"--conditioning_image {shown(path)} cannot be used: {error}. Give a readable image."
        ) from error


def _as_condition(picture: PIL.Image.Image, kind: ConditionKind, height: int, width: int) -> np.ndarray:
    mode = MODES[kind.channels]
    if kind.annotation is None:
        return _fitted(picture.convert(mode), height, width, kind.interpolation)
    photograph_HWC = _fitted(picture.convert("RGB"), height, width, TrainConfig().image_interpolation_mode)
    condition = PIL.Image.fromarray(make_condition(kind.annotation, photograph_HWC, TypicalDraws()))
    return np.asarray(condition.convert(mode)).reshape(height, width, kind.channels)


def _fitted(picture: PIL.Image.Image, height: int, width: int, interpolation: str) -> np.ndarray:
    channels = len(picture.getbands())
    return rendered(Picture(picture), view_of(picture.size, (width, height)), interpolation, channels=channels)


def _pictures_in(folder: Path) -> list[Path]:
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and path.is_file())
    except OSError as error:
        raise UserError(
            f"--conditioning_image {shown(folder)} cannot be read ({error.strerror}). Give a folder that you may read."
        ) from error
    if not files:
        raise UserError(
            f"--conditioning_image {shown(folder)} holds no picture ({', '.join(_ENDINGS)}). Give another folder, or "
            "the files themselves."
        )
    return files
