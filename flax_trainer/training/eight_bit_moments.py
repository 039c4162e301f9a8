"""Adam's moments in eight bits, on the device: codes by arithmetic, since a TPU looks nothing up in tables quickly.

`shared.eight_bit_moments` says what is stored. A dynamic number of decade d, 0 ≤ d < 7, is
10^(d-6)·(0.1 + 0.9·(k + ½)/2^e) with k < 2^e, where e is d for signed numbers and d + 1 for others. Codes count
upwards, so the distance from the code of zero tells n = 2^e + k; and n as a float has e as its exponent, k/2^e as its
fraction.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shared.eight_bit_moments import CODES, DECADES, blocks_of, code_of_zero, code_values

Array = jax.Array | np.ndarray

_LOWEST, _SPAN = 0.1, 0.9  # a decade's numbers are those shares of its upper end
_MANTISSA_BITS = 23


class _Numbers(NamedTuple):
    """The two kinds of dynamic numbers."""

    signed: bool

    @property
    def zero(self) -> int:
        """The code of 0."""
        return code_of_zero(signed=self.signed)

    @property
    def exponent(self) -> int:
        """e of the lowest decade."""
        return 0 if self.signed else 1

    @property
    def first(self) -> int:
        """n of the smallest positive number, whose code is `zero` + 1."""
        return 2**self.exponent


def dequantise(codes: jax.Array, scales: jax.Array, *, signed: bool) -> jax.Array:
    """uint8 codes of any shape, and the scales of their blocks → float32 of the codes' shape."""
    blocks = blocks_of(codes.shape)
    assert blocks is not None, codes.shape
    values = _value_of(codes, _Numbers(signed)).reshape(blocks.divided(codes.shape))
    return (values * jnp.expand_dims(scales, blocks.axis)).reshape(codes.shape)


def quantise(moment: jax.Array, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    """float32 → (codes uint8 of the same shape, scales float32 of its blocks)."""
    blocks = blocks_of(moment.shape)
    assert blocks is not None, moment.shape
    divided = moment.reshape(blocks.divided(moment.shape))
    scales = jnp.max(jnp.abs(divided), axis=blocks.axis)
    shares = divided / jnp.expand_dims(jnp.where(scales > 0, scales, 1), blocks.axis)
    return _nearest_code(shares, _Numbers(signed)).reshape(moment.shape), scales


def _value_of(codes: jax.Array, numbers: _Numbers) -> jax.Array:
    distance = codes.astype(jnp.int32) - numbers.zero
    n = (jnp.abs(distance) + (numbers.first - 1)).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(n, jnp.int32)
    exponent = (bits >> _MANTISSA_BITS) - 127
    power = jax.lax.bitcast_convert_type((exponent + 127) << _MANTISSA_BITS, jnp.float32)  # 2^e
    fraction = (n + 0.5) / power - 1  # (k + ½) / 2^e
    value = _upper_end(exponent - numbers.exponent) * (_LOWEST + _SPAN * fraction)
    value = jnp.where(codes == CODES - 1, 1.0, jnp.where(distance == 0, 0.0, value))
    return jnp.where(distance < 0, -value, value)


def _nearest_code(shares: jax.Array, numbers: _Numbers) -> jax.Array:
    """Of numbers from -1 to 1."""
    size = jnp.abs(shares)
    decade = jnp.zeros(size.shape, jnp.int32)
    for edge in _lower_edges(numbers)[1:]:
        decade += size > edge
    exponent = decade + numbers.exponent
    power = jax.lax.bitcast_convert_type((exponent + 127) << _MANTISSA_BITS, jnp.float32)
    fraction = (size / _upper_end(decade) - _LOWEST) / _SPAN
    k = jnp.clip(jnp.floor(fraction * power), 0, power - 1)
    distance = (power + k).astype(jnp.int32) - (numbers.first - 1)
    distance = jnp.where(size > _lower_edges(numbers)[0], distance, 0)
    if not numbers.signed:
        return jnp.where(size > _edge_of_one(numbers), CODES - 1, distance).astype(jnp.uint8)
    code = numbers.zero + jnp.where(shares < 0, -distance, distance)
    return jnp.where(shares > _edge_of_one(numbers), CODES - 1, code).astype(jnp.uint8)


def _upper_end(decade: jax.Array) -> jax.Array:
    """10^(d-6), which a power function would not give exactly."""
    ends = [np.float32(10.0 ** (number - DECADES + 1)) for number in range(DECADES)]
    chosen = jnp.full(decade.shape, ends[-1])
    for number in reversed(range(DECADES - 1)):
        chosen = jnp.where(decade <= number, ends[number], chosen)
    return chosen


def _lower_edges(numbers: _Numbers) -> list[float]:
    """From where on a number is nearer to the first of each decade than to what lies below."""
    values = code_values(signed=numbers.signed).astype(np.float64)[numbers.zero :]
    firsts = [2 ** (decade + numbers.exponent) - numbers.first + 1 for decade in range(DECADES)]
    return [float(values[first - 1] + values[first]) / 2 for first in firsts]


def _edge_of_one(numbers: _Numbers) -> float:
    below, one = code_values(signed=numbers.signed).astype(np.float64)[-2:]
    return float(below + one) / 2
