"""Normalisation whose sums and gradients have the form that suits a GPU; results differ by rounding alone.

Axes: B batch, P positions, C channels, G groups, D channels of a group, S parts of the positions, R rows: whatever
comes before C.

A GPU is bound by memory wherever it does not multiply matrices. What JAX derives of a normalisation sums in two or
three readings, and keeps float32 arrays of x's size from one sum to the next. Here both sums of a pass are one
operation, what they sum up is computed from x once more where it is needed, and positions are summed in parts.
Figures: docs/gpu_kernels.md.
"""

from functools import partial

import jax
import jax.numpy as jnp

Statistics = tuple[jax.Array, jax.Array]  # mean and reciprocal standard deviation
Kept = tuple[jax.Array, jax.Array, jax.Array, Statistics]
Gradients = tuple[jax.Array, jax.Array, jax.Array]  # of x, the weight and the bias

SUMMED_TOGETHER = 256  # positions: with more, there are fewer blocks of threads than a GPU can run


@partial(jax.custom_vjp, nondiff_argnames=("groups", "eps"))
def group_norm(x: jax.Array, weight_C: jax.Array, bias_C: jax.Array, groups: int, eps: float) -> jax.Array:
    """Group normalisation of B…C, computed in float32 whatever x's dtype, which the result has."""
    return _group_forward(x, weight_C, bias_C, groups, eps)[0]


def _group_forward(
    x: jax.Array, weight_C: jax.Array, bias_C: jax.Array, groups: int, eps: float
) -> tuple[jax.Array, Kept]:
    x_BPC = _positions(x).astype(jnp.float32)
    sums_BC, square_sums_BC = _sums_over_positions(x_BPC, jnp.square(x_BPC))
    mean_B1C = _over_groups(sums_BC, groups) / x_BPC.shape[1]
    if x.dtype == jnp.bfloat16:  # see `layers.basic._variance`
        squares_B1C = _over_groups(square_sums_BC, groups) / x_BPC.shape[1]
        variance_B1C = jnp.maximum(squares_B1C - jnp.square(mean_B1C), 0)
    else:
        variance_B1C = _over_groups(jnp.square(x_BPC - mean_B1C).mean(axis=1), groups)
    statistics = mean_B1C, jax.lax.rsqrt(variance_B1C + eps)
    y_BPC = _affine(_positions(x), weight_C, bias_C, statistics)
    return y_BPC.reshape(x.shape), (x, weight_C, bias_C, statistics)


def _group_backward(groups: int, eps: float, kept: Kept, cotangent: jax.Array) -> Gradients:
    x, weight_C, bias_C, statistics = kept
    normalised_BPC, cotangent_BPC = _normalised(_positions(x), statistics), _positions(cotangent).astype(jnp.float32)
    bias_sums_BC, weight_sums_BC = _sums_over_positions(cotangent_BPC, cotangent_BPC * normalised_BPC)
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


def _positions(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _sums_over_positions(first_BPC: jax.Array, second_BPC: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch, positions, channels = first_BPC.shape
    rows = SUMMED_TOGETHER if positions % SUMMED_TOGETHER == 0 else positions
    first_BSPC, second_BSPC = (x.reshape(batch, positions // rows, rows, channels) for x in (first_BPC, second_BPC))
    first_BSC, second_BSC = _two_sums(first_BSPC, second_BSPC, axis=2)
    return first_BSC.sum(axis=1), second_BSC.sum(axis=1)


def _two_sums(first: jax.Array, second: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Along an axis, as one operation: between two, XLA may write to memory what both sum up."""
    zeros = (jnp.float32(0), jnp.float32(0))

    def add(
        sums: tuple[jax.Array, jax.Array], terms: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return sums[0] + terms[0], sums[1] + terms[1]

    return jax.lax.reduce((first, second), zeros, add, (axis,))
