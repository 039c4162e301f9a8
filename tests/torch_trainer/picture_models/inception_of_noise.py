"""Weights of noise under the names and in the shapes of pytorch-fid's file, without the classifier."""

from collections.abc import Iterator

import numpy as np
import torch

# Name → (input channels, output channels, kernel's height and width).
_STEM = {
    "Conv2d_1a_3x3": (3, 32, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (32, 64, 3, 3),
    "Conv2d_3b_1x1": (64, 80, 1, 1),
    "Conv2d_4a_3x3": (80, 192, 3, 3),
}
_Shape = tuple[int, int, int, int]


def state_of_noise(seed: int = 0) -> dict[str, torch.Tensor]:
    """As the file holds it; scaled so that features neither vanish nor grow."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, (taken, given, height, width) in convolutions():
        scale = np.sqrt(2 / (taken * height * width))
        state[f"{name}.conv.weight"] = rng.normal(0, scale, (given, taken, height, width))
        state[f"{name}.bn.weight"] = rng.uniform(0.8, 1.2, given)
        state[f"{name}.bn.bias"] = rng.normal(0, 0.1, given)
        state[f"{name}.bn.running_mean"] = rng.normal(0, 0.1, given)
        state[f"{name}.bn.running_var"] = rng.uniform(0.8, 1.2, given)
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in state.items()}


def convolutions() -> Iterator[tuple[str, _Shape]]:
    """Szegedy et al. 2015, in the layout that TensorFlow published."""
    yield from _STEM.items()
    for letter, taken, pooled in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64)):
        block = f"Mixed_5{letter}"
        yield f"{block}.branch1x1", (taken, 64, 1, 1)
        yield f"{block}.branch5x5_1", (taken, 48, 1, 1)
        yield f"{block}.branch5x5_2", (48, 64, 5, 5)
        yield f"{block}.branch3x3dbl_1", (taken, 64, 1, 1)
        yield f"{block}.branch3x3dbl_2", (64, 96, 3, 3)
        yield f"{block}.branch3x3dbl_3", (96, 96, 3, 3)
        yield f"{block}.branch_pool", (taken, pooled, 1, 1)
    yield "Mixed_6a.branch3x3", (288, 384, 3, 3)
    yield "Mixed_6a.branch3x3dbl_1", (288, 64, 1, 1)
    yield "Mixed_6a.branch3x3dbl_2", (64, 96, 3, 3)
    yield "Mixed_6a.branch3x3dbl_3", (96, 96, 3, 3)
    for letter, inner in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
        block = f"Mixed_6{letter}"
        yield f"{block}.branch1x1", (768, 192, 1, 1)
        yield f"{block}.branch7x7_1", (768, inner, 1, 1)
        yield f"{block}.branch7x7_2", (inner, inner, 1, 7)
        yield f"{block}.branch7x7_3", (inner, 192, 7, 1)
        yield f"{block}.branch7x7dbl_1", (768, inner, 1, 1)
        yield f"{block}.branch7x7dbl_2", (inner, inner, 7, 1)
        yield f"{block}.branch7x7dbl_3", (inner, inner, 1, 7)
        yield f"{block}.branch7x7dbl_4", (inner, inner, 7, 1)
        yield f"{block}.branch7x7dbl_5", (inner, 192, 1, 7)
        yield f"{block}.branch_pool", (768, 192, 1, 1)
    yield "Mixed_7a.branch3x3_1", (768, 192, 1, 1)
    yield "Mixed_7a.branch3x3_2", (192, 320, 3, 3)
    yield "Mixed_7a.branch7x7x3_1", (768, 192, 1, 1)
    yield "Mixed_7a.branch7x7x3_2", (192, 192, 1, 7)
    yield "Mixed_7a.branch7x7x3_3", (192, 192, 7, 1)
    yield "Mixed_7a.branch7x7x3_4", (192, 192, 3, 3)
    for letter, taken in (("b", 1280), ("c", 2048)):
        block = f"Mixed_7{letter}"
        yield f"{block}.branch1x1", (taken, 320, 1, 1)
        yield f"{block}.branch3x3_1", (taken, 384, 1, 1)
        yield f"{block}.branch3x3_2a", (384, 384, 1, 3)
        yield f"{block}.branch3x3_2b", (384, 384, 3, 1)
        yield f"{block}.branch3x3dbl_1", (taken, 448, 1, 1)
        yield f"{block}.branch3x3dbl_2", (448, 384, 3, 3)
        yield f"{block}.branch3x3dbl_3a", (384, 384, 1, 3)
        yield f"{block}.branch3x3dbl_3b", (384, 384, 3, 1)
        yield f"{block}.branch_pool", (taken, 192, 1, 1)
