"""Images of several sizes through a model, those together that have one size after its image processor.

Axes: B images at once, H W of the original, h w and C as the model takes them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL.Image
import torch

from shared.data.sample import BadSampleError
from shared.models.source import shown_name
from shared.prepare_data.annotating import Annotator
from shared.prepare_data.conditions import Pixels
from shared.untrusted import foreign_library
from shared.user_errors import UserError
from torch_trainer.prepare_data.model_files import LoadedModel

Made = TypeVar("Made")

PostProcess = Callable[[Any, list[tuple[int, int]]], Sequence[torch.Tensor]]
"""From a model's output and the (H, W) wanted to a tensor [H,W] for each image."""


class ForModel(NamedTuple):
    """An image as a model takes it, and its size before that."""

    pixels_1Chw: torch.Tensor
    height_and_width: tuple[int, int]


def for_any_images(
    name: str, processor: Any, run: Callable[[torch.Tensor, list[ForModel]], Sequence[Made]]
) -> tuple[Callable[[Pixels], ForModel], Callable[[Sequence[ForModel]], list[Made]]]:
    """What prepares an image for a model, and what makes something of each of several that are prepared.

    Args:
        name: what the user calls the model.
        processor: its image processor.
        run: what it makes of images [B,C,h,w].

    Raises:
        UserError: the model fails at any image.
    """

    @torch.inference_mode()
    def work(images: Sequence[ForModel]) -> list[Made]:
        return _in_equal_shapes(images, run)

    prepare = partial(_prepare_image, processor)
    _try_out(name, prepare, work)
    return prepare, work


def dense_annotator(
    name: str, loaded: LoadedModel, post_process: PostProcess, as_pixels: Callable[[torch.Tensor], Pixels]
) -> Annotator:
    """An annotator of a model that says something of each pixel; `as_pixels` makes a picture of a tensor [H,W].

    Raises:
        UserError: the model fails at any image.
    """

    def run(pixels_BChw: torch.Tensor, group: list[ForModel]) -> list[Pixels]:
        output = loaded.model(pixels_BChw.to(loaded.device))
        return [as_pixels(one_HW.cpu()) for one_HW in post_process(output, [image.height_and_width for image in group])]

    return Annotator(*for_any_images(name, loaded.processor, run))


def _prepare_image(processor: Any, image_HWC: Pixels) -> ForModel:
    """uint8 RGB through an image processor of transformers. BadSampleError where that fails."""
    try:
        with foreign_library("its image cannot be prepared for the model", ""):
            made = processor(images=PIL.Image.fromarray(image_HWC), return_tensors="pt")
            return ForModel(made["pixel_values"], image_HWC.shape[:2])
    except UserError as error:
        raise BadSampleError(str(error).strip()) from error


def _in_equal_shapes(
    images: Sequence[ForModel], run: Callable[[torch.Tensor, list[ForModel]], Sequence[Made]]
) -> list[Made]:
    """What `run` makes of each of the images, of those at once whose tensors have one shape: [B,C,h,w]."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(tuple(image.pixels_1Chw.shape), []).append(number)
    made: dict[int, Made] = {}
    for numbers in groups.values():
        group = [images[number] for number in numbers]
        pixels_BChw = torch.cat([image.pixels_1Chw for image in group])
        made.update(zip(numbers, run(pixels_BChw, group), strict=True))
    return [made[number] for number in range(len(images))]


def _try_out(name: str, prepare: Callable[[Pixels], ForModel], work: Callable[[Sequence[ForModel]], object]) -> None:
    """Raises UserError where a model fails at any image: it may load, and not fit together."""
    fix = "Check that the folder or repository holds a whole model of this kind."
    with foreign_library(f"{shown_name(name)} fails at an image", fix):
        work([prepare(np.zeros((48, 64, 3), np.uint8))])
