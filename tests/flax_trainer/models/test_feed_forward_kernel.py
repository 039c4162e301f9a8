"""The feed-forward kernel for TPUs, interpreted, against the layers that it stands for, which agree with PyTorch's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_trainer.distributed.mesh import MeshEngine
from flax_trainer.models.kernels import feed_forward as kernels
from flax_trainer.models.kernels.feed_forward import FeedForwardParams, feed_forward
from flax_trainer.models.layers.basic import LayerNorm
from flax_trainer.models.layers.compute import Compute
from flax_trainer.models.layers.transformer import BasicTransformerBlock, FeedForward, TransformerSpec
from flax_trainer.models.params import Params, split

BATCH, CHANNELS, LENGTH = 2, 64, 256
INNER = 4 * CHANNELS
EPS = 1e-5


class Layers(nnx.Module):
    """Layer norm, network and residual, as `BasicTransformerBlock` computes them without the kernel."""

    def __init__(self) -> None:
        self.norm3 = LayerNorm(CHANNELS, eps=EPS)
        self.ff = FeedForward(CHANNELS)

    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        return x_BLC + self.ff(self.norm3(x_BLC))


def random_params(model: Any, dtype: str = "float32") -> Params:
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.standard_normal(value.shape, np.float32) / value.shape[0] ** 0.5, dtype)
        for name, value in split(model)[1].items()
    }


def of_kernel(params: Params) -> FeedForwardParams:
    modules = ("norm3", "ff.net.0.proj", "ff.net.2")
    return FeedForwardParams(*(params[f"{module}.{name}"] for module in modules for name in ("weight", "bias")))


def by_layers(x_BLC: jax.Array, params: Params) -> jax.Array:
    return split(nnx.eval_shape(Layers))[0].bind(params)(x_BLC)


def by_kernel(x_BLC: jax.Array, params: Params) -> jax.Array:
    return feed_forward(x_BLC.swapaxes(1, 2), of_kernel(params), EPS, True).swapaxes(1, 2)


def random_x(dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, LENGTH, CHANNELS), np.float32), dtype)


def assert_close(ours: Any, expected: Any, tolerance: float) -> None:
    for array, reference in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert array.shape == reference.shape
        difference = np.linalg.norm(np.asarray(array, np.float64) - np.asarray(reference, np.float64))
        assert difference <= tolerance * np.linalg.norm(np.asarray(reference, np.float64))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_the_kernel_and_its_gradients_are_those_of_the_layers(dtype: str, tolerance: float) -> None:
    params = random_params(nnx.eval_shape(Layers))
    given = {name: value.astype(dtype) for name, value in params.items()}
    with jax.default_matmul_precision("highest"):
        expected, expected_vjp = jax.vjp(by_layers, random_x(), params)
        ours, our_vjp = jax.vjp(by_kernel, random_x(dtype), given)
        cotangent = random_x() ** 2
        assert ours.dtype == dtype
        assert_close(ours, expected, tolerance)
        assert_close(our_vjp(cotangent.astype(dtype)), expected_vjp(cotangent), tolerance)


def test_frozen_weights_have_no_gradients_and_the_input_has_the_same() -> None:
    params = random_params(nnx.eval_shape(Layers))
    with jax.default_matmul_precision("highest"):
        (frozen,) = jax.vjp(lambda x: by_kernel(x, params), random_x())[1](random_x())
        trained, _ = jax.vjp(by_kernel, random_x(), params)[1](random_x())
    assert_close(frozen, trained, 1e-6)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Where a TPU would run the kernel, interpret it; the shapes that it gets."""
    shapes = []

    def kernel(x_BCL: jax.Array, params: FeedForwardParams, eps: float, interpret: bool = True) -> jax.Array:
        shapes.append(x_BCL.shape)
        return feed_forward(x_BCL, params, eps, interpret)

    monkeypatch.setattr(kernels, "feed_forward", kernel)
    return shapes


def test_transformers_use_the_kernel_where_it_fits(interpreted: list[tuple[int, ...]]) -> None:
    def block(fused: bool) -> BasicTransformerBlock:
        compute = Compute(fused_feed_forward=fused)
        return BasicTransformerBlock(
            CHANNELS, TransformerSpec(compute, 2, 1, 32, 8, use_linear_projection=True, only_cross_attention=False)
        )

    params = random_params(nnx.eval_shape(partial(block, True)), "bfloat16")
    text_BKE = jnp.ones((BATCH, 77, 32), jnp.bfloat16)

    def run(fused: bool, x_BLC: jax.Array) -> jax.Array:
        bound = split(nnx.eval_shape(partial(block, fused)))[0].bind(params)
        return bound(x_BLC, text_BKE)

    x_BLC = random_x("bfloat16")
    assert_close(run(True, x_BLC), run(False, x_BLC), 0.02)
    assert interpreted == [(BATCH, CHANNELS, LENGTH)]
    run(True, x_BLC[:, :100])
    assert len(interpreted) == 1


def test_the_kernel_runs_on_the_rows_of_each_device(interpreted: list[tuple[int, ...]]) -> None:
    engine = MeshEngine.over(jax.devices(), 1)
    params = random_params(nnx.eval_shape(Layers))
    x_BLC = np.tile(np.asarray(random_x()), (len(jax.devices()), 1, 1))

    def gradient(params: Any, frozen: Any, x_BLC: jax.Array) -> jax.Array:
        return jax.grad(lambda x_BLC: kernels.feed_forward_tpu(x_BLC, of_kernel(params), EPS).sum())(x_BLC)

    ours = engine.compile_for_rows(gradient)(params, {}, x_BLC)
    expected = jax.grad(lambda x_BLC: by_layers(x_BLC, params).sum())(jnp.asarray(x_BLC))
    assert_close(ours, expected, 1e-4)
    assert set(interpreted) == {(BATCH, CHANNELS, LENGTH)}
