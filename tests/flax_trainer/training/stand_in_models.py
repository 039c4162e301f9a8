"""Models of a line each, for tests of what a training step does with whatever its models are.

With one trained number, `weight`: prediction = 0.3 · noisy latents + weight · condition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_trainer.base_models import FrozenParams, ModelDefs


@dataclass(frozen=True)
class StandIn:
    """Where a `ModelDef` is expected."""

    make: Callable[[Any], Any]

    def bind(self, params: Any) -> Any:
        return self.make(params)


class Autoencoder:
    def encode(self, pixels_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean_BHWC = jnp.pad(pixels_BHWC[:, ::8, ::8], ((0, 0), (0, 0), (0, 0), (0, 1)))
        return mean_BHWC, jnp.full_like(mean_BHWC, 0.1)


def unet(noisy_BHWC: jax.Array, *_: jax.Array, mid_block_additional_residual: jax.Array, **__: Any) -> jax.Array:
    return 0.3 * noisy_BHWC + mid_block_additional_residual


STAND_INS: Any = ModelDefs(
    controlnet=StandIn(lambda params: lambda *inputs, **_: ((), params["weight"] * inputs[3][:, ::8, ::8, :1])),
    unet=StandIn(lambda params: unet),
    vae=StandIn(lambda params: Autoencoder()),
    text_encoder=StandIn(lambda params: lambda ids_BL: (jnp.zeros((*ids_BL.shape, 1)), None)),
)
NOTHING_FROZEN = FrozenParams({}, {}, {})


def batch_of(slices: int, rows: int) -> dict[str, np.ndarray]:
    """A batch of noise for them, [slices, rows, ...]."""
    rng = np.random.default_rng(0)
    return {
        "pixel_values": rng.integers(0, 256, (slices, rows, 64, 64, 3), np.uint8),
        "conditioning_pixel_values": rng.integers(0, 256, (slices, rows, 64, 64, 3), np.uint8),
        "input_ids": rng.integers(0, 500, (slices, rows, 77), np.int32),
        "vae_noise": rng.standard_normal((slices, rows, 8, 8, 4), np.float32),
        "noise": rng.standard_normal((slices, rows, 8, 8, 4), np.float32),
        "timesteps": rng.integers(0, 1000, (slices, rows), np.int32),
    }
