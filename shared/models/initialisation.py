"""Initial parameter values, the same in every backend.

A value depends on the seed, the module's name and the shape alone: not on the order in which modules are made, on the
framework, or on the machine. Shapes are PyTorch's (convolutions [out, in, height, width], linears [out, in]).
The caller says what kind of module it has; nothing is guessed from names.
"""

import hashlib
import math
from collections.abc import Mapping
from enum import StrEnum

import numpy as np

from shared.randomness import Purpose, generator

Shape = tuple[int, ...]


class ModuleKind(StrEnum):
    """What a module does with its parameters, which decides how they start."""

    AFFINE = "affine"  # convolutions and linears
    NORM = "norm"  # group and layer norms
    EMBEDDING = "embedding"  # tables of vectors
    ZERO = "zero"  # whatever must start as no contribution at all, like ControlNet's zero convolutions


def initial_values(
    seed: int, module: str, kind: ModuleKind, shapes: Mapping[str, Shape], *, embedding_std: float = 1.0
) -> dict[str, np.ndarray]:
    """Float32 starting values of one module's parameters.

    The distributions are PyTorch's defaults: convolution and linear weights and biases uniform in ±1/sqrt(fan_in)
    (`torch.nn.modules.conv._ConvNd.reset_parameters`), norms 1 and 0, embeddings normal. A ControlNet's zero
    convolutions are zero (Zhang et al. 2023, arXiv:2302.05543, equation 2).

    Args:
        seed: the run's seed, 0 to 2**64 - 1.
        module: the module's dotted name, `down_blocks.0.resnets.1.conv1`.
        kind: what the module is.
        shapes: PyTorch shapes of its parameters, keyed `weight` and, where it has one, `bias`.
        embedding_std: standard deviation of an embedding's entries; 1 in PyTorch, 0.02 in CLIP.

    Returns:
        One float32 array per key of `shapes`.

    Raises:
        UserError: the seed is out of range.
    """
    match kind:
        case ModuleKind.AFFINE:
            bound = 1.0 / math.sqrt(math.prod(shapes["weight"][1:]))
            return {
                key: _generator(seed, f"{module}.{key}").uniform(-bound, bound, shape).astype(np.float32)
                for key, shape in shapes.items()
            }
        case ModuleKind.EMBEDDING:
            return {
                key: _generator(seed, f"{module}.{key}").standard_normal(shape, np.float32) * np.float32(embedding_std)
                for key, shape in shapes.items()
            }
        case ModuleKind.NORM:
            return {key: np.full(shape, key == "weight", np.float32) for key, shape in shapes.items()}
        case ModuleKind.ZERO:
            return {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}


def _generator(seed: int, name: str) -> np.random.Generator:
    # A hash that is the same in every process, unlike `hash`, gives each name a stream of its own.
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return generator(seed, Purpose.INITIALISATION, int.from_bytes(digest, "little"))
