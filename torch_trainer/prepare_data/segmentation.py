"""`--condition segmentation`: ADE20K's classes in the colours that ControlNet's segmentation model knows.

Axes: H height, W width, N classes, C = 3 channels.
"""

from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from shared.models.source import shown_name
from shared.prepare_data.annotating import Annotator
from shared.prepare_data.conditions import Pixels
from shared.user_errors import UserError
from torch_trainer.prepare_data.ade20k import PALETTE_NC
from torch_trainer.prepare_data.equal_shapes import dense_annotator
from torch_trainer.prepare_data.model_files import IMAGE_PROCESSOR_FILES, load_model


def open_segmentation(name: str) -> Annotator:
    """Conditions uint8 [H,W,C] of a semantic segmentation.

    Raises:
        UserError: it is no model for that, or not of ADE20K's classes, or cannot be loaded.
    """
    loaded = load_model(AutoModelForSemanticSegmentation, AutoImageProcessor, name, IMAGE_PROCESSOR_FILES)
    if loaded.model.config.num_labels != len(PALETTE_NC):
        raise UserError(
            f"{shown_name(name)} tells {loaded.model.config.num_labels} classes apart: expected ADE20K's "
            f"{len(PALETTE_NC)}, which have the colours of ControlNet's segmentation maps."
        )

    def classes_of(output: Any, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        maps: list[torch.Tensor] = loaded.processor.post_process_semantic_segmentation(output, target_sizes=sizes)
        return maps

    return dense_annotator(name, loaded, classes_of, _as_pixels)


def _as_pixels(classes_HW: torch.Tensor) -> Pixels:
    return PALETTE_NC[classes_HW.numpy()]
