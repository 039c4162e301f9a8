"""Attention and the transformer between the UNet's residual blocks.

Axes: B batch, Q query positions, K key positions, L sequence length (image or text), N heads, D head features,
H height, W width, C channels (E in the text).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from flax_trainer.models.kernels.attention import CUDNN_KERNELS, AttentionKernel, dot_product_attention
from flax_trainer.models.kernels.feed_forward import FeedForwardParams, feed_forward_tpu, fits_feed_forward
from flax_trainer.models.layers.basic import GroupNorm, LayerNorm, Linear, PointwiseConv
from flax_trainer.models.layers.compute import Compute

TRANSFORMER_NORM_EPS = 1e-6  # fixed in diffusers' Transformer2DModel, unlike the residual blocks' norm_eps
FEED_FORWARD_MULTIPLIER = 4


@dataclass(frozen=True)
class TransformerSpec:
    """The transformers of one resolution."""

    compute: Compute
    heads: int
    layers: int
    cross_attention_dim: int
    norm_num_groups: int
    use_linear_projection: bool
    only_cross_attention: bool


class Attention(nnx.Module):
    """Multi-head attention from `channels` to a context of `context_channels`, without biases but the output's."""

    def __init__(self, channels: int, context_channels: int, heads: int, kernel: AttentionKernel):
        self.to_q = Linear(channels, channels, use_bias=False)
        self.to_k = Linear(context_channels, channels, use_bias=False)
        self.to_v = Linear(context_channels, channels, use_bias=False)
        self.to_out = nnx.List([Linear(channels, channels)])
        self.heads = heads
        self.kernel = kernel

    def __call__(self, x_BQC: jax.Array, context_BKE: jax.Array) -> jax.Array:
        query_BQND = _split_heads(self.to_q(x_BQC), self.heads)
        key_BKND = _split_heads(self.to_k(context_BKE), self.heads)
        value_BKND = _split_heads(self.to_v(context_BKE), self.heads)
        y_BQND = dot_product_attention(query_BQND, key_BKND, value_BKND, self.kernel)
        if self.kernel in CUDNN_KERNELS:  # which leave the heads' features side by side
            return self.to_out[0](y_BQND.reshape(x_BQC.shape))
        return self.to_out[0].from_heads(y_BQND)


class GEGLU(nnx.Module):
    """Gated linear unit with an exact GELU gate (Shazeer 2020, equation 6; the gate is the second half)."""

    def __init__(self, channels: int, inner_channels: int):
        self.proj = Linear(channels, 2 * inner_channels)

    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        value, gate = self.proj.halves(x_BLC)
        return value * gelu(gate)


def gelu(x: jax.Array) -> jax.Array:
    """Exact, in PyTorch's form. `jax.nn.gelu` is more accurate in the far tail, which costs a TPU more."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + jax.lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


class Identity(nnx.Module):
    """Holds the place, in a list, of a PyTorch layer without parameters."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class FeedForward(nnx.Module):
    """Position-wise GEGLU network."""

    def __init__(self, channels: int):
        inner = FEED_FORWARD_MULTIPLIER * channels
        # Index 1 is dropout in diffusers, always at rate 0 here; without it the output layer would be net.1.
        self.net = nnx.List([GEGLU(channels, inner), Identity(), Linear(inner, channels)])

    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        for layer in self.net:
            x_BLC = layer(x_BLC)
        return x_BLC

    @property
    def linears(self) -> tuple[Linear, Linear]:
        """Before and after the gated unit."""
        geglu, _, out = self.net
        assert isinstance(geglu, GEGLU)
        assert isinstance(out, Linear)
        return geglu.proj, out


class BasicTransformerBlock(nnx.Module):
    """Self-attention (or a first cross-attention), cross-attention to the text, feed-forward; each after a norm."""

    def __init__(self, channels: int, spec: TransformerSpec):
        first_context_channels = spec.cross_attention_dim if spec.only_cross_attention else channels
        self.norm1 = LayerNorm(channels, compute=spec.compute)
        self.attn1 = Attention(channels, first_context_channels, spec.heads, spec.compute.attention)
        self.norm2 = LayerNorm(channels, compute=spec.compute)
        self.attn2 = Attention(channels, spec.cross_attention_dim, spec.heads, spec.compute.attention)
        self.norm3 = LayerNorm(channels, compute=spec.compute)
        self.ff = FeedForward(channels)
        self.only_cross_attention = spec.only_cross_attention
        self.fused_feed_forward = spec.compute.fused_feed_forward

    def __call__(self, x_BLC: jax.Array, encoder_hidden_states_BKE: jax.Array) -> jax.Array:
        normalised_BLC = self.norm1(x_BLC)
        first_context = encoder_hidden_states_BKE if self.only_cross_attention else normalised_BLC
        x_BLC = x_BLC + self.attn1(normalised_BLC, first_context)
        x_BLC = x_BLC + self.attn2(self.norm2(x_BLC), encoder_hidden_states_BKE)
        if self.fused_feed_forward and fits_feed_forward(x_BLC):
            return feed_forward_tpu(x_BLC, self._feed_forward_params(x_BLC.dtype), self.norm3.eps)
        return x_BLC + self.ff(self.norm3(x_BLC))

    def _feed_forward_params(self, dtype: jnp.dtype) -> FeedForwardParams:
        proj, out = self.ff.linears
        assert proj.bias is not None
        assert out.bias is not None
        params = (self.norm3.weight, self.norm3.bias, proj.weight, proj.bias, out.weight, out.bias)
        return FeedForwardParams(*(param[...].astype(dtype) for param in params))


class Transformer2DModel(nnx.Module):
    """Transformer over the positions of a feature map, with a residual around it."""

    def __init__(self, channels: int, spec: TransformerSpec):
        self.norm = GroupNorm(spec.norm_num_groups, channels, eps=TRANSFORMER_NORM_EPS, compute=spec.compute)
        self.proj_in = _projection(channels, spec)
        self.transformer_blocks = nnx.List([BasicTransformerBlock(channels, spec) for _ in range(spec.layers)])
        self.proj_out = _projection(channels, spec)

    def __call__(self, x_BHWC: jax.Array, encoder_hidden_states_BKE: jax.Array) -> jax.Array:
        batch, height, width, channels = x_BHWC.shape
        h_BLC = self.proj_in(self.norm(x_BHWC).reshape(batch, height * width, channels))
        for block in self.transformer_blocks:
            h_BLC = block(h_BLC, encoder_hidden_states_BKE)
        return x_BHWC + self.proj_out(h_BLC).reshape(x_BHWC.shape)


def _projection(channels: int, spec: TransformerSpec) -> Linear | PointwiseConv:
    return (Linear if spec.use_linear_projection else PointwiseConv)(channels, channels)


def _split_heads(x_BLC: jax.Array, heads: int) -> jax.Array:
    batch, length, channels = x_BLC.shape
    return x_BLC.reshape(batch, length, heads, channels // heads)
