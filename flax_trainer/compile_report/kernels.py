"""What Pallas kernels cost: to XLA they are opaque calls, so their FLOPs are counted in the traced program."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from flax_trainer.model_flops import total_flops

LANES = 128  # a TPU multiplies matrices whose sides are multiples of this; shorter ones are filled up

KernelKey = tuple[str, tuple[tuple[int, ...], ...]]


def kernel_flops(jaxpr: Jaxpr) -> dict[KernelKey, float]:
    """FLOPs of every Pallas kernel of a traced program, by its name and the shapes of its operands.

    The sides of its products count filled up to the lanes: that is what the multipliers are busy with.
    """
    return {
        kernel_key(call.params["name"], _shapes(call)): math.prod(call.params["grid_mapping"].grid)
        * total_flops(call.params["jaxpr"], _padded_product_flops)
        for call in _pallas_calls(jaxpr)
    }


def kernel_key(name: str, operand_shapes: Any) -> KernelKey:
    return name, tuple(map(tuple, operand_shapes))


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> float:
    """Of the products QKᵀ and PV, from the factors' shapes: [..., Q, D], [..., K, D] and [..., K, E]."""
    *batch, queries, features = query
    keys, value_features = value[-2:]
    assert key[-2:] == (keys, features), (query, key, value)
    return 2.0 * math.prod(batch) * queries * _filled(keys) * (_filled(features) + _filled(value_features))


def _pallas_calls(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from _pallas_calls(inner)


def _padded_product_flops(product: JaxprEqn) -> float:
    sides = [(shape, *axes) for shape, axes in zip(_shapes(product), _axes(product), strict=True)]
    inner = math.prod(_filled(sides[0][0][axis]) for axis in sides[0][1])
    batch = math.prod(sides[0][0][axis] for axis in sides[0][2])
    outer = [
        math.prod(_filled(size) for axis, size in enumerate(shape) if axis not in (*contracted, *batched))
        for shape, contracted, batched in sides
    ]
    return 2.0 * batch * inner * math.prod(outer)


def _shapes(equation: JaxprEqn) -> list[tuple[int, ...]]:
    operands: list[Any] = [variable.aval for variable in equation.invars]
    return [operand.shape for operand in operands]


def _axes(product: JaxprEqn) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(contracted, batched) axes of the left and of the right factor."""
    contracted, batched = product.params["dimension_numbers"]
    return list(zip(contracted, batched, strict=True))


def _filled(size: int) -> int:
    return math.ceil(size / LANES) * LANES
