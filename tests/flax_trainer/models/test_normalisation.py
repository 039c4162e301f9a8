"""Normalisation in 16 bits against PyTorch's in float64, of the same numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_trainer.models.layers.basic import GroupNorm, LayerNorm

SHAPE = (2, 16, 16, 24)
MODULES: list[tuple[Callable[[], GroupNorm | LayerNorm], torch.nn.Module]] = [
    (lambda: GroupNorm(4, 24, eps=1e-6), torch.nn.GroupNorm(4, 24, eps=1e-6)),
    (lambda: LayerNorm(24), torch.nn.LayerNorm(24)),
]


def reference(module: torch.nn.Module, x_BHWC: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(x_BHWC)
    if isinstance(module, torch.nn.GroupNorm):
        return module.double()(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
    return module.double()(x).detach().numpy()


@pytest.mark.parametrize(("ours", "theirs"), MODULES, ids=["groups", "layers"])
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


@pytest.mark.parametrize(("ours", "_"), MODULES, ids=["groups", "layers"])
def test_what_does_not_vary_becomes_zero_and_has_finite_gradients(
    ours: Callable[[], GroupNorm | LayerNorm], _: torch.nn.Module
) -> None:
    """Rounding may put its mean square below its squared mean."""
    x_BHWC = jnp.full(SHAPE, 0.1, jnp.bfloat16)
    y, gradients_of = jax.vjp(ours(), x_BHWC)
    np.testing.assert_allclose(np.asarray(y, np.float32), 0, atol=1e-2)
    assert np.isfinite(np.asarray(gradients_of(y)[0], np.float32)).all()
