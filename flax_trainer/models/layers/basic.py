"""The few layers that every model here is made of.

Axes: B batch, S strips, H height, W width, C channels, L sequence length, N heads, D features, I inputs, O outputs,
Q P a kernel's width and height.

Parameters carry PyTorch's names (`weight`, `bias`) and the layouts that suit TPUs (WHIO convolutions, IO linears);
`params.py` turns one into the other. A layer computes in the dtype of its input: callers cast parameters, once.
Constructors make zeros: values come from a file or from `shared.models.initialisation`, never from here.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_trainer.models.kernels.convolution import convolve, weight_for_blocks
from flax_trainer.models.kernels.normalisation import group_norm, layer_norm
from flax_trainer.models.kernels.strips import STRIPS_NDIM, convolve_strips
from flax_trainer.models.kernels.sums import biased
from flax_trainer.models.layers.compute import PLAINLY, Compute
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
        return biased(y, self.bias[...])

    def on_blocks(self, x_BHWC: jax.Array, block: int) -> jax.Array:
        """The convolution of what lies in blocks of so many pixels; the result lies in blocks smaller by the stride."""
        weight_QPCO = weight_for_blocks(self.weight[...].astype(x_BHWC.dtype), self.stride, block)
        bias_O = jnp.tile(self.bias[...].astype(x_BHWC.dtype), (block // self.stride) ** 2)
        return convolve(x_BHWC, weight_QPCO, stride=1, padding=(1, 1), for_tpu=True) + bias_O


class PointwiseConv(nnx.Module):
    """`torch.nn.Conv2d` of kernel size 1, over the positions of a feature map in a row.

    As a product it takes and leaves any layout.
    """

    def __init__(self, in_channels: int, out_channels: int):
        self.weight = nnx.Param(jnp.zeros((1, 1, in_channels, out_channels)), layout=CONV)
        self.bias = nnx.Param(jnp.zeros((out_channels,)), layout=PLAIN)

    def __call__(self, x_BLI: jax.Array) -> jax.Array:
        weight_IO = self.weight[...].reshape(self.weight.shape[-2:])
        return biased(x_BLI @ weight_IO.astype(x_BLI.dtype), self.bias[...])


class Linear(nnx.Module):
    """`torch.nn.Linear` over the last axis."""

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True):
        self.weight = nnx.Param(jnp.zeros((in_features, out_features)), layout=LINEAR)
        self.bias = nnx.Param(jnp.zeros((out_features,)), layout=PLAIN) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.weight[...].astype(x.dtype)
        return y if self.bias is None else biased(y, self.bias[...])

    def halves(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first and the second half of the features, with a bias, each as a product of its own.

        The gradient of one product that is split is put together from two halves: a copy of the largest array.
        """
        assert self.bias is not None
        weights = jnp.split(self.weight[...].astype(x.dtype), 2, axis=-1)
        biases = jnp.split(self.bias[...], 2)
        first, second = (biased(x @ weight, bias) for weight, bias in zip(weights, biases, strict=True))
        return first, second

    def from_heads(self, x_BLND: jax.Array) -> jax.Array:
        """Of the features of all heads, which are never brought side by side: on a TPU, that is a copy."""
        assert self.bias is not None
        heads, features = x_BLND.shape[-2:]
        weight_NDO = self.weight[...].astype(x_BLND.dtype).reshape(heads, features, -1)
        return biased(jnp.einsum("blnd,ndo->blo", x_BLND, weight_NDO), self.bias[...])


class Embedding(nnx.Module):
    """`torch.nn.Embedding`: rows of a [count, features] table."""

    def __init__(self, count: int, features: int):
        self.weight = nnx.Param(jnp.zeros((count, features)), layout=PLAIN)

    def __call__(self, indices: jax.Array) -> jax.Array:
        return jnp.take(self.weight[...], indices, axis=0)


class GroupNorm(nnx.Module):
    """`torch.nn.GroupNorm` over B...C, statistics in float32 whatever the input's dtype."""

    def __init__(self, groups: int, channels: int, *, eps: float, compute: Compute = PLAINLY):
        self.weight = nnx.Param(jnp.ones((channels,)), layout=PLAIN)
        self.bias = nnx.Param(jnp.zeros((channels,)), layout=PLAIN)
        self.groups = groups
        self.eps = eps
        self.for_gpu = compute.gpu_normalisation

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.named_scope("normalisation"):
            if self.for_gpu:
                return group_norm(x, self.weight[...], self.bias[...], self.groups, self.eps)
            batch, channels = x.shape[0], x.shape[-1]
            grouped = x.astype(jnp.float32).reshape(batch, -1, self.groups, channels // self.groups)
            mean = grouped.mean(axis=(1, 3), keepdims=True)
            variance = _variance(grouped, mean, (1, 3), x.dtype)
            normalised = ((grouped - mean) * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
            weight, bias = self.weight[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
            return (normalised * weight + bias).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`torch.nn.LayerNorm` over the last axis, statistics in float32 whatever the input's dtype."""

    def __init__(self, features: int, *, eps: float = 1e-5, compute: Compute = PLAINLY):
        self.weight = nnx.Param(jnp.ones((features,)), layout=PLAIN)
        self.bias = nnx.Param(jnp.zeros((features,)), layout=PLAIN)
        self.eps = eps
        self.for_gpu = compute.gpu_normalisation

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.named_scope("normalisation"):
            if self.for_gpu:
                return layer_norm(x, self.weight[...], self.bias[...], self.eps)
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
