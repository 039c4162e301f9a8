"""The pictures that are asked for: each a prompt with a condition, and a number."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

from shared.config.validation import check_whole_groups
from shared.data.conditions import in_turn
from shared.data.pixels import Picture
from shared.data.preprocessing import decode, rendered
from shared.data.sample import BadSampleError
from shared.data.views import view_of
from shared.generate.options import GenerateConfig
from shared.untrusted import MIB, read_file, shown
from shared.untrusted.text import decoded
from shared.user_errors import UserError

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".ppm", ".avif", ".jp2")
_MOST_CONDITIONS = 1000  # they are held in memory: 3 GiB at 1024 px
_MOST_PICTURES = 10_000  # of one generation.json
_LARGEST_PROMPT_FILE = MIB


class Request(NamedTuple):
    """One picture. `number`, from 0, decides its noise; `condition` counts the groups of condition images."""

    number: int
    prompt: str
    condition: int

    @property
    def file_name(self) -> str:
        return f"{self.number:03}.png"


def prompts_of(config: GenerateConfig) -> list[str]:
    """Those of the command line, or of the file that it names.

    Raises:
        UserError: the file cannot be read, or holds none.
    """
    if config.prompt_file is None:
        return list(config.prompt or ())
    try:
        text = decoded(read_file(config.prompt_file, _LARGEST_PROMPT_FILE))
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt_file {shown(config.prompt_file)} is not UTF-8 at byte {error.start}. Write it in UTF-8."
        ) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--prompt_file {shown(config.prompt_file)} holds no prompt; expected one on each line.")
    return prompts


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


def pair(prompts: Sequence[str], conditions: int, images_per_prompt: int) -> list[Request]:
    """A request for every picture: each pair's pictures have numbers that follow each other.

    Raises:
        UserError: there are neither as many of one as of the other nor a single one of either, or too many.
    """
    if len(prompts) != conditions and 1 not in (len(prompts), conditions):
        raise UserError(
            f"There are {len(prompts)} prompts and {conditions} condition images: give as many of one as of the "
            "other, or a single one of either."
        )
    pairs = max(len(prompts), conditions)
    if pairs * images_per_prompt > _MOST_PICTURES:
        raise UserError(
            f"{pairs} pairs of prompt and condition with --num_images_per_prompt {images_per_prompt} are more than "
            f"{_MOST_PICTURES} pictures: ask for them in several parts, each with its own --output_dir."
        )
    return [
        Request(place * images_per_prompt + copy, prompts[place % len(prompts)], place % conditions)
        for place in range(pairs)
        for copy in range(images_per_prompt)
    ]


def read_conditions(
    paths: Sequence[Path], channels: Sequence[int], height: int, width: int, interpolation: str
) -> np.ndarray:
    """uint8 [H,W,N], one picture of each condition side by side, RGB or grey as `channels` has it: resized until they
    cover the picture, then cropped at the centre, as in training.

    Raises:
        UserError: one cannot be read.
    """
    of_each = zip(paths, channels, strict=True)
    parts = [_read_condition(path, count, height, width, interpolation) for path, count in of_each]
    return np.concatenate(parts, axis=-1)


def fitted(image: PIL.Image.Image, height: int, width: int, interpolation: str) -> np.ndarray:
    """uint8 [H,W,C] of a decoded image, as `read_conditions`; UserError for too many pixels on the way."""
    try:
        return rendered(
            Picture(image), view_of(image.size, (width, height)), interpolation, channels=len(image.getbands())
        )
    except BadSampleError as error:
        raise UserError(str(error)) from error


def _read_condition(path: Path, channels: int, height: int, width: int, interpolation: str) -> np.ndarray:
    try:
        return fitted(decode(path, channels), height, width, interpolation)
    except (BadSampleError, UserError) as error:
        raise UserError(
            f"--conditioning_image {shown(path)} cannot be used: {error}. Give a readable image."
        ) from error


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
