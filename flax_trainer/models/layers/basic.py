"""The few layers that every model here is made of.

Axes: B batch, S strips, H height, W width, C channels, L sequence length, D features, I inputs, O outputs,
Q P a kernel's width and height.

Parameters carry PyTorch's names (`weight`, `bias`) and the layouts that suit TPUs (WHIO convolutions, IO linears);
`params.py` turns one into the other. A layer computes in the dtype of its input: callers cast parameters, once.
Constructors make zeros: values come from a file or from `shared.models.initialisation`, never from here.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_trainer.models.kernels.convolution import convolve
from flax_trainer.models.kernels.strips import STRIPS_NDIM, convolve_strips
from flax_trainer.models.layers.compute import Compute
from flax_trainer.models.params import CONV, LINEAR, PLAIN


class Conv(nnx.Module):
    """2-D convolution over BHWC, or over the strips BSHWC of a feature map; `torch.nn.Conv2d`.

    `padding`: zeros on each side of both directions, or (before, after).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        compute: Compute,
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        self.weight = nnx.Param(jnp.zeros((kernel_size, kernel_size, in_channels, out_channels)), layout=CONV)
        self.bias = nnx.Param(jnp.zeros((out_channels,)), layout=PLAIN)
        self.stride = stride
        self.padding = (padding, padding) if isinstance(padding, int) else padding
        self.for_tpu = compute.tpu_convolutions

    def __call__(self, x: jax.Array) -> jax.Array:
        weight_QPCO = self.weight[...].astype(x.dtype)
        if x.ndim == STRIPS_NDIM:
            y = convolve_strips(x, weight_QPCO, self.stride, self.padding)
        else:
            y = convolve(x, weight_QPCO, self.stride, self.padding, for_tpu=self.for_tpu)
        return y + self.bias[...].astype(x.dtype)


class Linear(nnx.Module):
    """`torch.nn.Linear` over the last axis."""

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True):
        self.weight = nnx.Param(jnp.zeros((in_features, out_features)), layout=LINEAR)
        self.bias = nnx.Param(jnp.zeros((out_features,)), layout=PLAIN) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.weight[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
    """`torch.nn.Embedding`: rows of a [count, features] table."""

    def __init__(self, count: int, features: int):
        self.weight = nnx.Param(jnp.zeros((count, features)), layout=PLAIN)

    def __call__(self, indices: jax.Array) -> jax.Array:
        return jnp.take(self.weight[...], indices, axis=0)


class GroupNorm(nnx.Module):
    """`torch.nn.GroupNorm` over B...C, statistics in float32 whatever the input's dtype."""

    def __init__(self, groups: int, channels: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((channels,)), layout=PLAIN)
        self.bias = nnx.Param(jnp.zeros((channels,)), layout=PLAIN)
        self.groups = groups
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.named_scope("normalisation"):
            batch, channels = x.shape[0], x.shape[-1]
            grouped = x.astype(jnp.float32).reshape(batch, -1, self.groups, channels // self.groups)
            mean = grouped.mean(axis=(1, 3), keepdims=True)
            variance = _variance(grouped, mean, (1, 3), x.dtype)
            normalised = ((grouped - mean) * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
            weight, bias = self.weight[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
            return (normalised * weight + bias).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`torch.nn.LayerNorm` over the last axis, statistics in float32 whatever the input's dtype."""

    def __init__(self, features: int, *, eps: float = 1e-5):
        self.weight = nnx.Param(jnp.ones((features,)), layout=PLAIN)
        self.bias = nnx.Param(jnp.zeros((features,)), layout=PLAIN)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.named_scope("normalisation"):
            x32 = x.astype(jnp.float32)
            mean = x32.mean(axis=-1, keepdims=True)
            variance = _variance(x32, mean, -1, x.dtype)
            normalised = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
            weight, bias = self.weight[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
            return (normalised * weight + bias).astype(x.dtype)


def _variance(x32: jax.Array, mean: jax.Array, axis: int | tuple[int, ...], given: jnp.dtype) -> jax.Array:
    """Along an axis; of numbers given in bfloat16 as mean square less squared mean, which takes one reading, not two.

    What that loses in float32 is less than their 8 bits had lost before, and a TPU sums both while it computes x.
    """
    if given != jnp.bfloat16:
        return jnp.square(x32 - mean).mean(axis=axis, keepdims=True)
    return jnp.maximum(jnp.square(x32).mean(axis=axis, keepdims=True) - jnp.square(mean), 0)
