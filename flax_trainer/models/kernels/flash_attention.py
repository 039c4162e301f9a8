"""FlashAttention (Dao et al. 2022) for TPUs, of heads whose keys and values fit a core's own memory.

Axes: B batch, N heads, D head features, Q query positions, K key positions, P queries in a block, R keys in a block.

Positions lie in the lanes and features in the rows, of inputs and results. JAX's splash attention, which takes inputs
so, has features in the lanes of its results and of what it keeps for the gradients: heads of 40 features fill 128 lanes
with zeros, which are written, read and copied. Softmax's sums then run over rows, and what is kept of them takes one
row for each head, where splash attention writes 128 copies. A caption's keys need no blocks, and no mask.
Figures: docs/tpu_kernels.md.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Gradients = tuple[jax.Array, jax.Array, jax.Array]  # of the query, the key and the value
Kept = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]

LANES = 128
BLOCK = 512  # queries, and keys, whose scores are computed at a time
GRADIENT_BLOCK = 256
QUERIES = 64  # a multiple of it
# Of the keys of a head. With its values, both gradients, their sums in float32 and the next head's, that takes twelve
# times as much of a TPU core's own 16 MiB.
KEYS_MAX_BYTES = 64 * 4096 * 2


def fits_flash_attention(queries: int, keys: int, features: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel has blocks for these lengths, and room for the keys."""
    has_blocks = queries % LANES == 0 or (queries % QUERIES == 0 and queries <= BLOCK)
    keys_have_blocks = keys % LANES == 0 or keys < LANES
    return has_blocks and keys_have_blocks and keys * features * dtype.itemsize <= KEYS_MAX_BYTES


@partial(jax.custom_vjp, nondiff_argnames=("interpret",))
def flash_attention(
    query_BNDQ: jax.Array, key_BNDK: jax.Array, value_BNDK: jax.Array, interpret: bool = False
) -> jax.Array:
    """softmax(QᵀK/√D)Vᵀ of each head, transposed: [B, N, D, Q].

    Args:
        query_BNDQ, key_BNDK, value_BNDK: three arrays of one dtype, of sizes that `fits_flash_attention` allows.
        interpret: run the kernel's operations one by one, on any device: for tests.
    """
    return _forward(query_BNDQ, key_BNDK, value_BNDK, interpret)[0]


def _forward(
    query_BNDQ: jax.Array, key_BNDK: jax.Array, value_BNDK: jax.Array, interpret: bool
) -> tuple[jax.Array, Kept]:
    of_queries, of_keys, of_sums, grid = _blocks(query_BNDQ, key_BNDK, BLOCK)
    y_BNDQ, log_sum_BN1Q = pl.pallas_call(
        partial(_forward_kernel, block=_block(key_BNDK.shape[-1], BLOCK)),
        grid=grid,
        in_specs=[of_queries, of_keys, of_keys],
        out_specs=[of_queries, of_sums],
        out_shape=[
            jax.ShapeDtypeStruct(query_BNDQ.shape, query_BNDQ.dtype),
            jax.ShapeDtypeStruct((*query_BNDQ.shape[:2], 1, query_BNDQ.shape[-1]), jnp.float32),
        ],
        compiler_params=_of_heads_by_themselves(),
        name="flash_attention",
        interpret=interpret,
    )(query_BNDQ, key_BNDK, value_BNDK)
    return y_BNDQ, (query_BNDQ, key_BNDK, value_BNDK, y_BNDQ, log_sum_BN1Q)


def _backward(interpret: bool, kept: Kept, cotangent_BNDQ: jax.Array) -> Gradients:
    query_BNDQ, key_BNDK, value_BNDK, *_ = kept
    features, keys = key_BNDK.shape[2:]
    of_queries, of_keys, of_sums, grid = _blocks(query_BNDQ, key_BNDK, GRADIENT_BLOCK)
    d_query_BNDQ, d_key_BNDK, d_value_BNDK = pl.pallas_call(
        partial(_backward_kernel, block=_block(keys, GRADIENT_BLOCK)),
        grid=grid,
        in_specs=[of_queries, of_keys, of_keys, of_queries, of_sums, of_queries],
        out_specs=[of_queries, of_keys, of_keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query_BNDQ, key_BNDK, value_BNDK)],
        scratch_shapes=[pltpu.VMEM((features, keys), jnp.float32)] * 2,
        compiler_params=_of_heads_by_themselves(),
        name="flash_attention_gradients",
        interpret=interpret,
    )(*kept, cotangent_BNDQ)
    return d_query_BNDQ, d_key_BNDK, d_value_BNDK


flash_attention.defvjp(_forward, _backward)


def _blocks(query_BNDQ: jax.Array, key_BNDK: jax.Array, largest: int) -> tuple[Any, Any, Any, tuple[int, int, int]]:
    """Blocks of queries, all keys of a head, blocks of what there is one of for each query; the grid over them."""
    batch, heads, features, queries = query_BNDQ.shape
    block = _block(queries, largest)
    return (
        pl.BlockSpec((None, None, features, block), lambda b, n, q: (b, n, 0, q)),
        pl.BlockSpec((None, None, features, key_BNDK.shape[-1]), lambda b, n, q: (b, n, 0, 0)),
        pl.BlockSpec((None, None, 1, block), lambda b, n, q: (b, n, 0, q)),
        (batch, heads, queries // block),
    )


def _block(length: int, largest: int) -> int:
    return math.gcd(length, largest) if length % LANES == 0 else length


def _of_heads_by_themselves() -> pltpu.CompilerParams:
    """Heads may be computed in any order, on either core; the queries of one come one after another."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _forward_kernel(q_ref: Any, k_ref: Any, v_ref: Any, y_ref: Any, log_sum_ref: Any, *, block: int) -> None:
    q_DP = _scaled(q_ref)
    largest_1P = jnp.full(log_sum_ref.shape, -jnp.inf, jnp.float32)
    sum_1P, y_DP = jnp.zeros(log_sum_ref.shape, jnp.float32), jnp.zeros(q_ref.shape, jnp.float32)
    for start in range(0, k_ref.shape[1], block):
        scores_RP = _product(k_ref[:, start : start + block].T, q_DP)
        new_largest_1P = jnp.maximum(largest_1P, scores_RP.max(axis=0, keepdims=True))
        shares_RP = jnp.exp(scores_RP - new_largest_1P)
        shrink_1P = jnp.exp(largest_1P - new_largest_1P)
        sum_1P = shrink_1P * sum_1P + shares_RP.sum(axis=0, keepdims=True)
        y_DP = shrink_1P * y_DP + _product(v_ref[:, start : start + block], shares_RP.astype(v_ref.dtype))
        largest_1P = new_largest_1P
    y_ref[...] = (y_DP / sum_1P).astype(y_ref.dtype)
    log_sum_ref[...] = largest_1P + jnp.log(sum_1P)


def _backward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    y_ref: Any,
    log_sum_ref: Any,
    dy_ref: Any,
    dq_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    dk_sum_ref: Any,
    dv_sum_ref: Any,
    *,
    block: int,
) -> None:
    """Algorithm 4 of Dao et al., whose inner loop is the outer one here: the queries' gradients come in one part."""

    @pl.when(pl.program_id(2) == 0)
    def begin() -> None:
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    dtype = q_ref.dtype
    q_DP, dy_DP = _scaled(q_ref), dy_ref[...]
    mean_1P = (dy_DP.astype(jnp.float32) * y_ref[...].astype(jnp.float32)).sum(axis=0, keepdims=True)
    dq_DP = jnp.zeros(q_ref.shape, jnp.float32)
    for start in range(0, k_ref.shape[1], block):
        keys = slice(start, start + block)
        k_DR, v_DR = k_ref[:, keys], v_ref[:, keys]
        shares_RP = jnp.exp(_product(k_DR.T, q_DP) - log_sum_ref[...])
        d_scores_RP = (shares_RP * (_product(v_DR.T, dy_DP) - mean_1P)).astype(dtype)
        dv_sum_ref[:, keys] += _product_over_queries(dy_DP, shares_RP.astype(dtype))
        dk_sum_ref[:, keys] += _product_over_queries(q_DP, d_scores_RP)
        dq_DP += _product(k_DR, d_scores_RP)
    dq_ref[...] = (dq_DP * _scale(q_ref)).astype(dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def end() -> None:
        dk_ref[...] = dk_sum_ref[...].astype(dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dtype)


def _scaled(q_ref: Any) -> jax.Array:
    return (q_ref[...].astype(jnp.float32) * _scale(q_ref)).astype(q_ref.dtype)


def _scale(q_ref: Any) -> float:
    features = q_ref.shape[0]
    return float(features**-0.5)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _product_over_queries(a_DP: jax.Array, b_RP: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a_DP, b_RP, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
