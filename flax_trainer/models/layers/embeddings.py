"""Timestep embeddings.

Axes: B batch, C channels (embedding features).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_trainer.models.layers.basic import Linear

MAX_PERIOD = 10000


def timestep_embedding(timesteps_B: jax.Array, features: int, *, flip_sin_to_cos: bool, freq_shift: int) -> jax.Array:
    """Sinusoids of the timestep (Ho et al. 2020, after Vaswani et al. 2017, section 3.5), as diffusers lays them out.

    Args:
        timesteps_B: numbers of any dtype, not necessarily whole; diffusion steps in [0, 1000), or SDXL's pixel sizes.
        features: C; an odd one ends in a zero.
        flip_sin_to_cos: cosines first rather than sines first.
        freq_shift: subtracted from C/2 in the exponent's denominator.
    Returns:
        float32 [B, C] in [-1, 1], whatever the model's dtype: bfloat16 cannot tell 999 from 1000.
    """
    half = features // 2
    # The float32 roundings below are PyTorch's: at t=999 a different last bit of a frequency already shows in the sine.
    exponents = np.float32(-math.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles_BC = timesteps_B.astype(jnp.float32)[:, None] * frequencies[None, :]
    sines_BC, cosines_BC = jnp.sin(angles_BC), jnp.cos(angles_BC)
    halves = (cosines_BC, sines_BC) if flip_sin_to_cos else (sines_BC, cosines_BC)
    embedding_BC = jnp.concatenate(halves, axis=-1)
    return jnp.pad(embedding_BC, ((0, 0), (0, features % 2)))


class TimestepEmbedding(nnx.Module):
    """The two-layer perceptron after the sinusoids."""

    def __init__(self, in_features: int, time_embed_dim: int):
        self.linear_1 = Linear(in_features, time_embed_dim)
        self.linear_2 = Linear(time_embed_dim, time_embed_dim)

    def __call__(self, x_BC: jax.Array) -> jax.Array:
        return self.linear_2(nnx.silu(self.linear_1(x_BC)))
