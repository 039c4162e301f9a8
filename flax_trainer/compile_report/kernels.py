"""What Pallas kernels cost: to XLA they are opaque calls, so their FLOPs are counted in the traced program."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from flax_trainer.profiling.model_flops import total_flops

# A product of float32 numbers is one of their bfloat16 parts, or several that are added up.
_PASSES = {jax.lax.Precision.DEFAULT: 1, jax.lax.Precision.HIGH: 3, jax.lax.Precision.HIGHEST: 6}

KernelKey = tuple[str, tuple[tuple[int, ...], ...]]


def kernel_flops(jaxpr: Jaxpr, multiplier: int) -> dict[KernelKey, float]:
    """What the multipliers are busy with in every Pallas kernel of a traced program, in FLOPs.

    The sides of its products count filled up to the multiplier's, and a product as often as it passes through it.

    Args:
        jaxpr: the program.
        multiplier: sides of the matrices that the chip multiplies at a time.
    Returns:
        FLOPs by the kernel's name and the shapes of its operands.
    """
    return {
        kernel_key(call.params["name"], _shapes(call)): math.prod(call.params["grid_mapping"].grid)
        * total_flops(call.params["jaxpr"], partial(_busy_flops, multiplier=multiplier))
        for call in _pallas_calls(jaxpr)
    }


def kernel_key(name: str, operand_shapes: Any) -> KernelKey:
    return name, tuple(map(tuple, operand_shapes))


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], multiplier: int) -> float:
    """Of the products QKᵀ and PV, as busy: the factors' shapes are [..., Q, D], [..., K, D] and [..., K, E]."""
    *batch, queries, features = query
    keys, value_features = value[-2:]
    assert key[-2:] == (keys, features), (query, key, value)
    filled_features = _filled(features, multiplier) + _filled(value_features, multiplier)
    return 2.0 * math.prod(batch) * queries * _filled(keys, multiplier) * filled_features


def _pallas_calls(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from _pallas_calls(inner)


def _busy_flops(product: JaxprEqn, multiplier: int) -> float:
    sides = [(shape, *axes) for shape, axes in zip(_shapes(product), _axes(product), strict=True)]
    inner = math.prod(_filled(sides[0][0][axis], multiplier) for axis in sides[0][1])
    batch = math.prod(sides[0][0][axis] for axis in sides[0][2])
    outer = [
        math.prod(_filled(size, multiplier) for axis, size in enumerate(shape) if axis not in (*contracted, *batched))
        for shape, contracted, batched in sides
    ]
    return 2.0 * batch * inner * math.prod(outer) * _passes(product)


def _passes(product: JaxprEqn) -> int:
    operands: list[Any] = [variable.aval for variable in product.invars]
    if all(operand.dtype != jnp.float32 for operand in operands):
        return 1
    precision = product.params["precision"]
    return _PASSES[jax.lax.Precision.DEFAULT if precision is None else max(precision, key=_PASSES.__getitem__)]


def _shapes(equation: JaxprEqn) -> list[tuple[int, ...]]:
    operands: list[Any] = [variable.aval for variable in equation.invars]
    return [operand.shape for operand in operands]


def _axes(product: JaxprEqn) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(contracted, batched) axes of the left and of the right factor."""
    contracted, batched = product.params["dimension_numbers"]
    return list(zip(contracted, batched, strict=True))


def _filled(size: int, multiplier: int) -> int:
    return math.ceil(size / multiplier) * multiplier
