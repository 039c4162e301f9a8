"""`--condition pose` and `soft_edges`: detectors of the package controlnet_aux, which draw as ControlNet's own do.

Their weights are published as PyTorch pickles alone. They are read with `weights_only`, which builds tensors and calls
nothing that a file names.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import torch

from shared.models.source import shown_name
from shared.prepare_data.annotating import Annotator
from shared.prepare_data.conditions import Pixels
from shared.untrusted import foreign_library, unpickling
from torch_trainer.prepare_data.model_files import device_there

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # PyTorch then refuses to be told otherwise


def open_pose(name: str) -> Annotator:
    """Bodies as OpenPose draws them, uint8 [H,W,C]; black where there are none.

    Raises:
        UserError: the package is broken, or the folder or repository has not the weights.
    """
    return _open(
        lambda package: package.OpenposeDetector, name, "body_pose_model.pth, hand_pose_model.pth, facenet.pth"
    )


def open_soft_edges(name: str) -> Annotator:
    """Edges as HED finds them, uint8 [H,W,C], its three channels alike.

    Raises:
        UserError: as `open_pose`.
    """
    return _open(lambda package: package.HEDdetector, name, "ControlNetHED.pth")


def _open(detector_in: Callable[[Any], Any], name: str, weights: str) -> Annotator:
    with foreign_library("The package controlnet_aux cannot be used", "Run: pip install controlnet_aux torchvision"):
        import controlnet_aux

        detector_class = detector_in(controlnet_aux)
    fix = f"Expected a folder, or a repository of the Hub, with {weights}."
    with unpickling(shown_name(name), "cannot be loaded by controlnet_aux", fix, fix), _weights_only():
        detector = detector_class.from_pretrained(name).to(device_there())

    @torch.inference_mode()
    def annotate(images: Sequence[Pixels]) -> list[Pixels]:
        return [_detected(detector, image_HWC) for image_HWC in images]

    return Annotator(lambda image_HWC: image_HWC, annotate)


def _detected(detector: Any, image_HWC: Pixels) -> Pixels:
    """Of any size: the detectors round theirs to multiples of 64, so the result is brought back to the image's."""
    height, width = image_HWC.shape[:2]
    shorter = min(height, width)
    drawn = detector(image_HWC, detect_resolution=512, image_resolution=max(64, shorter), output_type="pil")
    return np.asarray(drawn.convert("RGB").resize((width, height), PIL.Image.Resampling.BILINEAR))


@contextmanager
def _weights_only() -> Iterator[None]:
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before
