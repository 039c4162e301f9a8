"""Residual blocks and changes of resolution in the UNet.

Axes: B batch, H height, W width, C channels, T time embedding features.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_trainer.models.layers.basic import Conv, GroupNorm, Linear
from flax_trainer.models.layers.compute import Compute


@dataclass(frozen=True)
class ResnetSpec:
    """What all residual blocks of a model have in common."""

    compute: Compute
    time_embed_dim: int
    norm_num_groups: int
    norm_eps: float
    output_scale_factor: float = 1.0


class ResnetBlock2D(nnx.Module):
    """Pre-activation residual block with an additive time embedding (diffusers' `ResnetBlock2D`)."""

    def __init__(self, in_channels: int, out_channels: int, spec: ResnetSpec):
        self.norm1 = GroupNorm(spec.norm_num_groups, in_channels, eps=spec.norm_eps, compute=spec.compute)
        self.conv1 = Conv(in_channels, out_channels, 3, spec.compute, padding=1)
        self.time_emb_proj = Linear(spec.time_embed_dim, out_channels)
        self.norm2 = GroupNorm(spec.norm_num_groups, out_channels, eps=spec.norm_eps, compute=spec.compute)
        self.conv2 = Conv(out_channels, out_channels, 3, spec.compute, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else Conv(in_channels, out_channels, 1, spec.compute)
        self.output_scale_factor = spec.output_scale_factor

    def __call__(self, x_BHWC: jax.Array, time_embedding_BT: jax.Array) -> jax.Array:
        h_BHWC = self.conv1(nnx.silu(self.norm1(x_BHWC)))
        h_BHWC = h_BHWC + self.time_emb_proj(nnx.silu(time_embedding_BT))[:, None, None, :]
        h_BHWC = self.conv2(nnx.silu(self.norm2(h_BHWC)))
        skip_BHWC = x_BHWC if self.conv_shortcut is None else self.conv_shortcut(x_BHWC)
        return (skip_BHWC + h_BHWC) / self.output_scale_factor


class Downsample2D(nnx.Module):
    """Halve H and W with a strided convolution. Padding 0 pads one row below and one column to the right instead."""

    def __init__(self, channels: int, padding: int, compute: Compute):
        self.conv = Conv(channels, channels, 3, compute, stride=2, padding=padding or (0, 1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbour enlargement to a given size, usually twice, then a convolution."""

    def __init__(self, channels: int, compute: Compute):
        self.conv = Conv(channels, channels, 3, compute, padding=1)

    def __call__(self, x_BHWC: jax.Array, height: int, width: int) -> jax.Array:
        return self.conv(_enlarge(_enlarge(x_BHWC, 1, height), 2, width))


def _enlarge(x_BHWC: jax.Array, axis: int, size: int) -> jax.Array:
    """`torch.nn.functional.interpolate(mode="nearest")` along one axis."""
    given = x_BHWC.shape[axis]
    if size == 2 * given:
        # Repetition becomes a broadcast on TPU; the gather below, and the scatter of its gradient, are slow there.
        return jnp.repeat(x_BHWC, 2, axis=axis)
    return jnp.take(x_BHWC, np.arange(size) * given // size, axis=axis)
