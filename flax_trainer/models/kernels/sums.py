"""Sums over the positions of feature maps, in the form that suits a GPU and does a CPU no harm.

Axes: B batch, P positions, C channels, S parts of the positions; … any number of axes.

A GPU is bound by memory wherever it does not multiply matrices. Of sums over all axes but the last, XLA makes too few
blocks of threads where they are few, and they are slow at computing what they sum up. Figures: docs/gpu_kernels.md.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

SUMMED_TOGETHER = 256  # positions at least, by one block of threads
MOST_PARTS = 64  # of an image's positions; each makes a row of sums that is read again


@jax.custom_vjp
def biased(x: jax.Array, bias_C: jax.Array) -> jax.Array:
    """x [B…C] and a bias of any floating dtype, in x's dtype. The bias's gradient is summed up in float32."""
    return x + bias_C.astype(x.dtype)


def _forward(x: Any, bias: Any) -> tuple[jax.Array, jax.Array | None]:
    return biased(x.value, bias.value), bias.value if bias.perturbed else None


def _backward(bias_C: jax.Array | None, cotangent: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    if bias_C is None:
        return cotangent, None
    at_once, in_parts = (partial(function, dtype=bias_C.dtype) for function in (_at_once, _in_parts))
    return jax.lax.platform_dependent(cotangent, tpu=at_once, default=in_parts)


biased.defvjp(_forward, _backward, symbolic_zeros=True)


def _at_once(cotangent: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """As JAX derives it: in the cotangent's dtype, in which CPUs add up, too, and lose small terms."""
    return cotangent, jax.lax.reduce_sum(cotangent, range(cotangent.ndim - 1)).astype(dtype)


def _in_parts(cotangent: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    cotangent = jax.lax.optimization_barrier(cotangent)  # a product needs it in memory, where it can be read again
    (sums_BC,) = sums_over_positions(as_positions(cotangent).astype(jnp.float32))
    return cotangent, sums_BC.sum(axis=0).astype(dtype)


def as_positions(x: jax.Array) -> jax.Array:
    """B…C → BPC."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def sums_over_positions(*terms_BPC: jax.Array) -> tuple[jax.Array, ...]:
    """[B, C] of each, of float32 arrays of one shape."""
    batch, positions, channels = terms_BPC[0].shape
    terms_BSPC = (terms.reshape(batch, _parts(positions), -1, channels) for terms in terms_BPC)
    return tuple(sums_BSC.sum(axis=1) for sums_BSC in sums_along(2, *terms_BSPC))


def _parts(positions: int) -> int:
    """A power of two that divides them."""
    most = max(1, min(MOST_PARTS, positions // SUMMED_TOGETHER))
    return math.gcd(positions, 1 << (most.bit_length() - 1))


def sums_along(axis: int, *terms: jax.Array) -> tuple[jax.Array, ...]:
    """Along an axis, of float32 arrays of one shape: one operation, or XLA may write to memory what they sum up."""
    zeros = (jnp.float32(0),) * len(terms)
    return tuple(jax.lax.reduce(terms, zeros, lambda sums, terms: jax.tree.map(jnp.add, sums, terms), (axis,)))
