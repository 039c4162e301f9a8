"""Normalisation in 16 bits against PyTorch's in float64, of the same numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_trainer.models.layers.basic import GroupNorm, LayerNorm
from flax_trainer.models.layers.compute import PLAINLY, Compute
from flax_trainer.models.params import split

SHAPE = (2, 16, 16, 24)
ON_GPU = Compute(gpu_normalisation=True)
MODULES: list[tuple[Callable[[], GroupNorm | LayerNorm], torch.nn.Module]] = [
    (lambda: GroupNorm(4, 24, eps=1e-6), torch.nn.GroupNorm(4, 24, eps=1e-6)),
    (lambda: LayerNorm(24), torch.nn.LayerNorm(24)),
    (lambda: GroupNorm(4, 24, eps=1e-6, compute=ON_GPU), torch.nn.GroupNorm(4, 24, eps=1e-6)),
    (lambda: LayerNorm(24, compute=ON_GPU), torch.nn.LayerNorm(24)),
]
IDS = ["groups", "layers", "groups for GPUs", "layers for GPUs"]


def reference(module: torch.nn.Module, x_BHWC: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(x_BHWC)
    if isinstance(module, torch.nn.GroupNorm):
        return module.double()(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
    return module.double()(x).detach().numpy()


@pytest.mark.parametrize(("ours", "theirs"), MODULES, ids=IDS)
@pytest.mark.parametrize(
    ("dtype", "mean"),
    [("bfloat16", 0.0), ("bfloat16", -30.0), ("float16", 0.0), ("float16", -30.0), ("float16", 1000.0)],
)
def test_statistics_lose_no_more_than_the_result_is_rounded(
    ours: Callable[[], GroupNorm | LayerNorm], theirs: torch.nn.Module, dtype: str, mean: float
) -> None:
    """Also where the mean is 30 times the standard deviation; of float16 numbers, whose steps are finer, 1000 times."""
    drawn = np.random.default_rng(0).normal(mean, 1, SHAPE)
    x_BHWC = jnp.asarray(drawn, dtype)
    expected = reference(theirs, np.asarray(x_BHWC, np.float64))
    half_a_step = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(ours()(x_BHWC), np.float64), expected, rtol=1.1 * half_a_step, atol=2e-4)


@pytest.mark.parametrize(("ours", "_"), MODULES, ids=IDS)
def test_what_does_not_vary_becomes_zero_and_has_finite_gradients(
    ours: Callable[[], GroupNorm | LayerNorm], _: torch.nn.Module
) -> None:
    """Rounding may put its mean square below its squared mean."""
    x_BHWC = jnp.full(SHAPE, 0.1, jnp.bfloat16)
    y, gradients_of = jax.vjp(ours(), x_BHWC)
    np.testing.assert_allclose(np.asarray(y, np.float32), 0, atol=1e-2)
    assert np.isfinite(np.asarray(gradients_of(y)[0], np.float32)).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda compute: GroupNorm(4, 24, eps=1e-6, compute=compute),
        lambda compute: LayerNorm(24, compute=compute),
    ],
    ids=["groups", "layers"],
)
@pytest.mark.parametrize("side", [7, 32])  # positions in one part, and in several
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-3)])
def test_the_form_for_gpus_has_the_gradients_that_jax_derives(
    make: Callable[[Compute], GroupNorm | LayerNorm], side: int, dtype: str, tolerance: float
) -> None:
    """Of the same numbers in float32, up to the rounding of the result to the dtype."""
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(mean, 1, (2, side, side, 24)), dtype) for mean in (3, 0))
    weight, bias = (jnp.asarray(rng.normal(1, 0.3, 24), dtype) for _ in range(2))

    def gradients(compute: Compute, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        definition, _ = split(make(compute))

        def function(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
            return definition.bind({"weight": weight, "bias": bias})(x)

        *primals, cotangent = arrays
        y, gradients_of = jax.vjp(function, *primals)
        return y, *gradients_of(cotangent)

    arrays = (x, weight, bias, cotangent)
    expected = gradients(PLAINLY, *(array.astype(jnp.float32) for array in arrays))
    for ours, reference in zip(gradients(ON_GPU, *arrays), expected, strict=True):
        assert ours.dtype == dtype
        assert np.linalg.norm(np.float32(ours) - reference) <= tolerance * np.linalg.norm(reference)
