"""Distances between what two runs came to."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from safetensors.numpy import load_file


def trained_weights(folder: Path) -> dict[str, np.ndarray]:
    """The ControlNet in a folder of diffusers' layout."""
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def relative(given: Sequence[float], expected: Sequence[float]) -> list[float]:
    """|given − expected| / |expected| of each pair."""
    return [abs(one - other) / max(abs(other), 1e-12) for one, other in zip(given, expected, strict=True)]


def distance(given: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """‖given − expected‖ / ‖expected‖ over all parameters together."""
    differences = sum(float(np.square(given[name] - value).sum(dtype=np.float64)) for name, value in expected.items())
    return (differences / sum(float(np.square(value).sum(dtype=np.float64)) for value in expected.values())) ** 0.5


def picture(path: Path) -> np.ndarray:
    """float32 [H,W,3], 0 to 255."""
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float32)
