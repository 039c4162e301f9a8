"""`--condition depth`: as the depth-estimation pipeline of transformers draws it, near things bright.

Axes: H height, W width.
"""

from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from shared.prepare_data.annotating import Annotator
from shared.prepare_data.conditions import Pixels
from shared.user_errors import UserError
from torch_trainer.prepare_data.equal_shapes import dense_annotator
from torch_trainer.prepare_data.model_files import IMAGE_PROCESSOR_FILES, load_model


def open_depth(name: str) -> Annotator:
    """Conditions uint8 [H,W] of the depth that a model estimates, from 0 to 255 in each image.

    Raises:
        UserError: it is no model for that, or cannot be loaded.
    """
    loaded = load_model(AutoModelForDepthEstimation, AutoImageProcessor, name, IMAGE_PROCESSOR_FILES)

    def depths_of(output: Any, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        # By place: models differ in what they call the sizes.
        return [one["predicted_depth"] for one in loaded.processor.post_process_depth_estimation(output, sizes)]

    return dense_annotator(name, loaded, depths_of, _as_pixels)


def _as_pixels(depth_HW: torch.Tensor) -> Pixels:
    depth = depth_HW.numpy()
    if not np.isfinite(depth).all():
        raise UserError("The model's depths are no finite numbers: its weights are damaged. Use another one.")
    lowest, span = depth.min(), np.ptp(depth)
    if span == 0:  # one depth everywhere
        return np.zeros(depth.shape, np.uint8)
    return ((depth - lowest) / span * 255).astype(np.uint8)
