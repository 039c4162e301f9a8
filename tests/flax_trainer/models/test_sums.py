"""Biases, whose gradients are sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_trainer.models.kernels import sums
from flax_trainer.models.kernels.sums import SUMMED_TOGETHER, biased


def draw(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(1, 1, shape), dtype), jnp.asarray(rng.normal(0, 1, shape[-1]), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 5), (2, 16, SUMMED_TOGETHER, 5)])
def test_a_biass_gradient_is_the_sum_over_everything_else(shape: tuple[int, ...], dtype: str) -> None:
    """Of 16-bit numbers too, of which a sum of many in 16 bits loses a fifth."""
    x, bias = draw(shape, dtype)
    y, gradients_of = jax.vjp(biased, x, bias)
    np.testing.assert_array_equal(y, x + bias)
    x_gradient, bias_gradient = gradients_of(x)
    np.testing.assert_array_equal(x_gradient, x)
    assert bias_gradient.dtype == dtype
    expected = np.float64(x).reshape(-1, shape[-1]).sum(axis=0)
    np.testing.assert_allclose(np.float64(bias_gradient), expected, rtol=max(1e-6, float(jnp.finfo(dtype).eps)))


def test_a_frozen_bias_costs_no_sum() -> None:
    x, bias = draw((2, 7, 5), "float32")
    program = jax.make_jaxpr(jax.grad(lambda x: biased(x, bias).sum()))(x)
    assert "platform_index" not in str(program)
    assert "platform_index" in str(jax.make_jaxpr(jax.grad(lambda bias: biased(x, bias).sum()))(bias))


@pytest.mark.parametrize(
    ("positions", "parts"), [(1, 1), (64, 1), (256, 1), (1024, 4), (4096, 16), (72 * 72, 16), (65 * 65, 1), (2**18, 64)]
)
def test_parts_divide_the_positions(positions: int, parts: int) -> None:
    assert sums._parts(positions) == parts
