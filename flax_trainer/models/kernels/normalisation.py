"""Normalisation whose sums and gradients have the form that suits a GPU; results differ by rounding alone.

Axes: B batch, P positions, C channels, G groups, D channels of a group; … any number of axes.

What JAX derives of a normalisation sums in two or three readings, and keeps float32 arrays of x's size from one sum to
the next. Here x is kept as it is given, and what is computed from it is computed once more where it is needed.
"""

from functools import partial

import jax
import jax.numpy as jnp

from flax_trainer.models.kernels.sums import as_positions, sums_along, sums_over_positions

Statistics = tuple[jax.Array, jax.Array]  # mean and reciprocal standard deviation
Kept = tuple[jax.Array, jax.Array, jax.Array, Statistics]
Gradients = tuple[jax.Array, jax.Array, jax.Array]  # of x, the weight and the bias


@partial(jax.custom_vjp, nondiff_argnames=("groups", "eps"))
def group_norm(x: jax.Array, weight_C: jax.Array, bias_C: jax.Array, groups: int, eps: float) -> jax.Array:
    """Group normalisation of B…C, computed in float32 whatever x's dtype, which the result has."""
    return _group_forward(x, weight_C, bias_C, groups, eps)[0]


def _group_forward(
    x: jax.Array, weight_C: jax.Array, bias_C: jax.Array, groups: int, eps: float
) -> tuple[jax.Array, Kept]:
    x_BPC = as_positions(x).astype(jnp.float32)
    if x.dtype == jnp.bfloat16:  # see `layers.basic._variance`
        both = sums_over_positions(x_BPC, jnp.square(x_BPC))
        mean_B1C, squares_B1C = (_over_groups(sums_BC, groups) / x_BPC.shape[1] for sums_BC in both)
        variance_B1C = jnp.maximum(squares_B1C - jnp.square(mean_B1C), 0)
    else:
        mean_B1C = _over_groups(x_BPC.mean(axis=1), groups)
        variance_B1C = _over_groups(jnp.square(x_BPC - mean_B1C).mean(axis=1), groups)
    statistics = mean_B1C, jax.lax.rsqrt(variance_B1C + eps)
    y_BPC = _affine(as_positions(x), weight_C, bias_C, statistics)
    return y_BPC.reshape(x.shape), (x, weight_C, bias_C, statistics)


def _group_backward(groups: int, eps: float, kept: Kept, cotangent: jax.Array) -> Gradients:
    x, weight_C, bias_C, statistics = kept
    normalised_BPC = _normalised(as_positions(x), statistics)
    cotangent_BPC = as_positions(cotangent).astype(jnp.float32)
    bias_sums_BC, weight_sums_BC = sums_over_positions(cotangent_BPC, cotangent_BPC * normalised_BPC)
    weight32_C = weight_C.astype(jnp.float32)
    mean_B1C, projection_B1C = (
        _over_groups(sums_BC * weight32_C, groups) / normalised_BPC.shape[1]
        for sums_BC in (bias_sums_BC, weight_sums_BC)
    )
    gradient_BPC = statistics[1] * (cotangent_BPC * weight32_C - mean_B1C - normalised_BPC * projection_B1C)
    return (
        gradient_BPC.astype(x.dtype).reshape(x.shape),
        weight_sums_BC.sum(axis=0).astype(weight_C.dtype),
        bias_sums_BC.sum(axis=0).astype(bias_C.dtype),
    )


group_norm.defvjp(_group_forward, _group_backward)


@partial(jax.custom_vjp, nondiff_argnames=("eps",))
def layer_norm(x: jax.Array, weight_C: jax.Array, bias_C: jax.Array, eps: float) -> jax.Array:
    """Normalisation along C of B…C, computed in float32 whatever x's dtype, which the result has."""
    return _layer_forward(x, weight_C, bias_C, eps)[0]


def _layer_forward(x: jax.Array, weight_C: jax.Array, bias_C: jax.Array, eps: float) -> tuple[jax.Array, Kept]:
    x32 = x.astype(jnp.float32)
    if x.dtype == jnp.bfloat16:
        mean, squares = (sums[..., None] / x.shape[-1] for sums in sums_along(x.ndim - 1, x32, jnp.square(x32)))
        variance = jnp.maximum(squares - jnp.square(mean), 0)
    else:
        mean = x32.mean(axis=-1, keepdims=True)
        variance = jnp.square(x32 - mean).mean(axis=-1, keepdims=True)
    statistics = mean, jax.lax.rsqrt(variance + eps)
    return _affine(x, weight_C, bias_C, statistics), (x, weight_C, bias_C, statistics)


def _layer_backward(eps: float, kept: Kept, cotangent: jax.Array) -> Gradients:
    x, weight_C, bias_C, statistics = kept
    normalised, cotangent32 = _normalised(x, statistics), cotangent.astype(jnp.float32)
    weighted = cotangent32 * weight_C.astype(jnp.float32)
    mean, projection = (
        sums[..., None] / x.shape[-1] for sums in sums_along(x.ndim - 1, weighted, weighted * normalised)
    )
    gradient = statistics[1] * (weighted - mean - normalised * projection)
    terms_BPC = map(as_positions, (cotangent32, cotangent32 * normalised))
    bias_sums_BC, weight_sums_BC = sums_over_positions(*terms_BPC)
    return (
        gradient.astype(x.dtype),
        weight_sums_BC.sum(axis=0).astype(weight_C.dtype),
        bias_sums_BC.sum(axis=0).astype(bias_C.dtype),
    )


layer_norm.defvjp(_layer_forward, _layer_backward)


def _affine(x: jax.Array, weight_C: jax.Array, bias_C: jax.Array, statistics: Statistics) -> jax.Array:
    y = _normalised(x, statistics) * weight_C.astype(jnp.float32) + bias_C.astype(jnp.float32)
    return y.astype(x.dtype)


def _normalised(x: jax.Array, statistics: Statistics) -> jax.Array:
    mean, rescale = statistics
    return (x.astype(jnp.float32) - mean) * rescale


def _over_groups(values_BC: jax.Array, groups: int) -> jax.Array:
    """The mean over each group's channels, at each of them: [B, 1, C]."""
    values_BGD = values_BC.reshape(len(values_BC), groups, -1)
    means_BGD = jnp.broadcast_to(values_BGD.mean(axis=2, keepdims=True), values_BGD.shape)
    return means_BGD.reshape(len(values_BC), 1, -1)
