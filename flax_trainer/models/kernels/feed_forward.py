"""A transformer's feed-forward network as one kernel for TPUs: layer norm, GEGLU, output and residual.

Axes: B batch, C channels, I inner channels, J those of the product before GEGLU (values, then gates), L positions,
P positions in a block, R inner channels in a block, S sums in the lanes.

With 320 channels XLA is bound by what its products read and write, of which the inner channels are most: here these
never leave a core's own memory, and the gradients compute them once more. Positions lie in the lanes, as
`flash_attention.py` has them. Figures: docs/tpu_kernels.md.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MOST_CHANNELS = 384  # XLA's own products of wider ones are as fast, and the weights would not fit a core's own memory
POSITIONS = 512  # computed at a time, at most
GRADIENT_POSITIONS = 256
TRAINED_GRADIENT_POSITIONS = 128  # of which more is written
INNER_CHANNELS = 128  # computed at a time


class FeedForwardParams(NamedTuple):
    """Arrays of one dtype; in the same places, what belongs to them (gradients, whether one is asked for)."""

    norm_weight_C: Any
    norm_bias_C: Any
    weight_CJ: Any
    bias_J: Any
    out_weight_IC: Any
    out_bias_C: Any


def fits_feed_forward(x_BLC: jax.Array) -> bool:
    """Whether the kernel is made for such arrays."""
    _, length, channels = x_BLC.shape
    return x_BLC.dtype == jnp.bfloat16 and length % LANES == 0 and channels <= MOST_CHANNELS


def feed_forward_tpu(x_BLC: jax.Array, params: FeedForwardParams, eps: float) -> jax.Array:
    """x + network(layer norm of x), on the rows of each device of the surrounding mesh."""
    with jax.named_scope("feed_forward"):
        kernel = partial(feed_forward, eps=eps)
        axes = jax.sharding.get_abstract_mesh().auto_axes
        if axes:
            rows, whole = jax.sharding.PartitionSpec(axes), jax.sharding.PartitionSpec()
            kernel = jax.shard_map(kernel, in_specs=(rows, whole), out_specs=rows, check_vma=False)
        return kernel(x_BLC.swapaxes(1, 2), params).swapaxes(1, 2)


@partial(jax.custom_vjp, nondiff_argnames=("eps", "interpret"))
def feed_forward(x_BCL: jax.Array, params: FeedForwardParams, eps: float, interpret: bool = False) -> jax.Array:
    """x + network(layer norm of x), as torch's `LayerNorm`, then diffusers' `FeedForward` computes it.

    Products sum in float32; between them, only what is multiplied is rounded to x's dtype.
    """
    channels, length = x_BCL.shape[1:]
    block = math.gcd(length, POSITIONS)
    of_x = pl.BlockSpec((None, channels, block), lambda b, i: (b, 0, i))
    weights = [*_up_to_geglu(params), params.out_weight_IC.T, _column(params.out_bias_C)]
    return pl.pallas_call(
        partial(_forward_kernel, eps=eps),
        grid=(x_BCL.shape[0], length // block),
        in_specs=[of_x, *map(_whole, weights)],
        out_specs=of_x,
        out_shape=jax.ShapeDtypeStruct(x_BCL.shape, x_BCL.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="feed_forward",
        interpret=interpret,
    )(x_BCL, *weights)


def _forward(x: Any, params: Any, eps: float, interpret: bool) -> tuple[jax.Array, Any]:
    values = FeedForwardParams(*(param.value for param in params))
    trained = () if any(param.perturbed for param in params) else None  # a tree without arrays, either way
    return feed_forward(x.value, values, eps, interpret), (x.value, values, trained)


def _backward(eps: float, interpret: bool, kept: Any, dy_BCL: jax.Array) -> tuple[jax.Array, FeedForwardParams | None]:
    x_BCL, params, trained = kept
    if trained is None:
        (dx_BCL,) = _gradients(x_BCL, params, dy_BCL, GRADIENT_POSITIONS, (), eps, interpret)
        return dx_BCL, None
    (channels, length), inner = x_BCL.shape[1:], len(params.out_weight_IC)

    def written(size: int) -> tuple[int, int, Any]:
        return size, length, x_BCL.dtype

    def sums(size: int) -> tuple[int, int, Any]:
        return size, LANES, jnp.float32

    outputs = (written(channels), *[written(inner)] * 3, *[sums(channels)] * 3, *[sums(inner)] * 2)
    results = _gradients(x_BCL, params, dy_BCL, TRAINED_GRADIENT_POSITIONS, outputs, eps, interpret)
    dx_BCL, normalised_BCL, inner_BIL, d_value_BIL, d_gate_BIL, *sums_BIS = results
    d_norm_weight_C, d_norm_bias_C, d_out_bias_C, *d_biases_I = (sums_BIS.sum(axis=(0, 2)) for sums_BIS in sums_BIS)
    d_weights_CI = [_over_positions(normalised_BCL, d_BIL) for d_BIL in (d_value_BIL, d_gate_BIL)]
    gradients = FeedForwardParams(
        d_norm_weight_C,
        d_norm_bias_C,
        jnp.concatenate(d_weights_CI, axis=1),
        jnp.concatenate(d_biases_I),
        _over_positions(inner_BIL, dy_BCL),
        d_out_bias_C,
    )
    return dx_BCL, jax.tree.map(lambda gradient, param: gradient.astype(param.dtype), gradients, params)


feed_forward.defvjp(_forward, _backward, symbolic_zeros=True)


def _gradients(
    x_BCL: jax.Array,
    params: FeedForwardParams,
    dy_BCL: jax.Array,
    positions: int,
    outputs: tuple[tuple[int, int, Any], ...],
    eps: float,
    interpret: bool,
) -> list[jax.Array]:
    """x's gradient, and what makes the weights': (rows, positions or lanes, dtype) of each."""
    batch, channels, length = x_BCL.shape
    block = math.gcd(length, positions)

    def spec(size: int, columns: int) -> pl.BlockSpec:
        if columns == length:
            return pl.BlockSpec((None, size, block), lambda b, i: (b, 0, i))
        return pl.BlockSpec((None, size, columns), lambda b, i: (b, 0, 0))

    outputs = ((channels, length, x_BCL.dtype), *outputs)
    weights = [*_up_to_geglu(params), params.weight_CJ, params.out_weight_IC]
    results: list[jax.Array] = pl.pallas_call(
        partial(_backward_kernel, eps=eps),
        grid=(batch, length // block),
        in_specs=[spec(channels, length)] * 2 + [*map(_whole, weights)],
        out_specs=[spec(size, columns) for size, columns, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct((batch, size, columns), dtype) for size, columns, dtype in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="feed_forward_gradients",
        interpret=interpret,
    )(x_BCL, dy_BCL, *weights)
    return results


def _over_positions(x_BIL: jax.Array, dy_BOL: jax.Array) -> jax.Array:
    return jnp.einsum("bil,bol->io", x_BIL, dy_BOL)


def _up_to_geglu(params: FeedForwardParams) -> tuple[jax.Array, ...]:
    return _column(params.norm_weight_C), _column(params.norm_bias_C), params.weight_CJ.T, _column(params.bias_J)


def _column(x_C: jax.Array) -> jax.Array:
    return x_C.astype(jnp.float32)[:, None]


def _whole(array: jax.Array) -> pl.BlockSpec:
    """It never changes, so that a second buffer for what comes next would stay empty."""
    return pl.BlockSpec(array.shape, lambda b, i: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))


def _forward_kernel(
    x_ref: Any,
    norm_weight_ref: Any,
    norm_bias_ref: Any,
    weight_ref: Any,
    bias_ref: Any,
    out_weight_ref: Any,
    out_bias_ref: Any,
    y_ref: Any,
    *,
    eps: float,
) -> None:
    x_CP = x_ref[...].astype(jnp.float32)
    hat_CP, _ = _normalised(x_CP, eps)
    normalised_CP = (hat_CP * norm_weight_ref[...] + norm_bias_ref[...]).astype(x_ref.dtype)
    y_CP = x_CP + out_bias_ref[...]
    for rows in _inner_blocks(out_weight_ref.shape[1]):
        value_RP, gate_RP = _value_and_gate(weight_ref, bias_ref, normalised_CP, rows)
        inner_RP = (value_RP * gate_RP * _share(gate_RP)).astype(x_ref.dtype)
        y_CP += _product(out_weight_ref[:, rows], inner_RP)
    y_ref[...] = y_CP.astype(y_ref.dtype)


def _backward_kernel(
    x_ref: Any,
    dy_ref: Any,
    norm_weight_ref: Any,
    norm_bias_ref: Any,
    transposed_ref: Any,
    bias_ref: Any,
    weight_ref: Any,
    out_weight_ref: Any,
    dx_ref: Any,
    *trained_refs: Any,
    eps: float,
) -> None:
    dtype, inner = x_ref.dtype, out_weight_ref.shape[0]
    hat_CP, scale_1P = _normalised(x_ref[...].astype(jnp.float32), eps)
    normalised_CP = (hat_CP * norm_weight_ref[...] + norm_bias_ref[...]).astype(dtype)
    dy_CP, d_normalised_CP = dy_ref[...], jnp.zeros(x_ref.shape, jnp.float32)
    if trained_refs:
        normalised_ref, inner_ref, d_value_ref, d_gate_ref, *sum_refs = trained_refs
        d_norm_weight_ref, d_norm_bias_ref, d_out_bias_ref, d_value_bias_ref, d_gate_bias_ref = sum_refs
        _begin(sum_refs)

    for rows in _inner_blocks(inner):
        value_RP, gate_RP = _value_and_gate(transposed_ref, bias_ref, normalised_CP, rows)
        d_inner_RP = _product(out_weight_ref[rows, :], dy_CP)
        share_RP = _share(gate_RP)
        density_RP = jnp.exp(-0.5 * gate_RP * gate_RP) * (1 / math.sqrt(2 * math.pi))
        d_value_RP = d_inner_RP * gate_RP * share_RP
        d_gate_RP = d_inner_RP * value_RP * (share_RP + gate_RP * density_RP)
        d_normalised_CP += _product(weight_ref[:, rows], d_value_RP.astype(dtype))
        d_normalised_CP += _product(weight_ref[:, _gates(rows, inner)], d_gate_RP.astype(dtype))
        if trained_refs:
            inner_ref[rows, :] = (value_RP * gate_RP * share_RP).astype(dtype)
            d_value_ref[rows, :], d_gate_ref[rows, :] = d_value_RP.astype(dtype), d_gate_RP.astype(dtype)
            d_value_bias_ref[rows, :] += _lane_sums(d_value_RP)
            d_gate_bias_ref[rows, :] += _lane_sums(d_gate_RP)

    d_hat_CP = d_normalised_CP * norm_weight_ref[...]
    along_hat_1P = (d_hat_CP * hat_CP).mean(axis=0, keepdims=True)
    of_norm_CP = scale_1P * (d_hat_CP - d_hat_CP.mean(axis=0, keepdims=True) - hat_CP * along_hat_1P)
    dx_ref[...] = (dy_CP.astype(jnp.float32) + of_norm_CP).astype(dtype)
    if trained_refs:
        normalised_ref[...] = normalised_CP
        d_norm_weight_ref[...] += _lane_sums(d_normalised_CP * hat_CP)
        d_norm_bias_ref[...] += _lane_sums(d_normalised_CP)
        d_out_bias_ref[...] += _lane_sums(dy_CP.astype(jnp.float32))


def _begin(sum_refs: list[Any]) -> None:
    """Sums over an image's positions begin with its first block."""

    @pl.when(pl.program_id(1) == 0)
    def begin() -> None:
        for ref in sum_refs:
            ref[...] = jnp.zeros_like(ref)


def _normalised(x_CP: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Without weight and bias; and by how much it was scaled."""
    centred_CP = x_CP - x_CP.mean(axis=0, keepdims=True)
    scale_1P = jax.lax.rsqrt(jnp.square(centred_CP).mean(axis=0, keepdims=True) + eps)
    return centred_CP * scale_1P, scale_1P


def _inner_blocks(inner: int) -> list[slice]:
    size = math.gcd(inner, INNER_CHANNELS)
    return [slice(start, start + size) for start in range(0, inner, size)]


def _gates(rows: slice, inner: int) -> slice:
    return slice(inner + rows.start, inner + rows.stop)


def _value_and_gate(
    transposed_ref: Any, bias_ref: Any, normalised_CP: jax.Array, rows: slice
) -> tuple[jax.Array, jax.Array]:
    value_RP, gate_RP = (
        _product(transposed_ref[part, :], normalised_CP) + bias_ref[part, :]
        for part in (rows, _gates(rows, transposed_ref.shape[0] // 2))
    )
    return value_RP, gate_RP


def _share(gate: jax.Array) -> jax.Array:
    """What GELU lets pass of a gate: the normal distribution function."""
    return 0.5 * (1 + jax.lax.erf(gate * math.sqrt(0.5)))


def _lane_sums(x_CP: jax.Array) -> jax.Array:
    """Sums of what lies in the same lane; the lanes themselves are added up outside of the kernel."""
    first_CS, *others_CS = (x_CP[:, start : start + LANES] for start in range(0, x_CP.shape[1], LANES))
    return sum(others_CS, start=first_CS)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # Exact, whatever `jax_default_matmul_precision` says: the compiler of kernels refuses more of bfloat16 numbers.
    exactly = jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), exactly, preferred_element_type=jnp.float32)
