"""Convolutions of feature maps in strips against PyTorch's of whole ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_trainer.models.kernels.strips import STRIPS, convolve_strips, from_strips, to_strips
from flax_trainer.models.params import CONV, from_torch_layout


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_strips_stand_side_by_side() -> None:
    x_BHWC = draw(2, 3, 4 * STRIPS, 5)
    strips = to_strips(jnp.asarray(x_BHWC))
    np.testing.assert_array_equal(strips[:, 1], x_BHWC[:, :, 4:8])
    np.testing.assert_array_equal(from_strips(strips), x_BHWC)


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding"),
    [(3, 1, (1, 1)), (3, 2, (0, 1)), (3, 2, (1, 1)), (1, 1, (0, 0))],
)
def test_strips_convolved_are_the_feature_map_convolved(
    width: int, kernel_size: int, stride: int, padding: tuple[int, int]
) -> None:
    """`width` columns a strip after the convolution; the result and the gradients of half its squares' sum."""
    x_BHWC, weight_OIHW = draw(2, 7, STRIPS * width * stride, 5), draw(7, 5, kernel_size, kernel_size)
    x_BCHW = torch.from_numpy(x_BHWC.transpose(0, 3, 1, 2).copy()).requires_grad_()
    kernel = torch.from_numpy(weight_OIHW).requires_grad_()
    expected = torch.nn.functional.conv2d(torch.nn.functional.pad(x_BCHW, padding * 2), kernel, stride=stride)
    (expected.square().sum() / 2).backward()
    assert x_BCHW.grad is not None
    assert kernel.grad is not None

    function = partial(convolve_strips, stride=stride, padding=padding)
    weight_QPCO = jnp.asarray(from_torch_layout(weight_OIHW, CONV))
    y_BSHWO, gradients_of = jax.vjp(function, to_strips(jnp.asarray(x_BHWC)), weight_QPCO)
    x_gradient, weight_gradient = gradients_of(y_BSHWO)
    assert y_BSHWO.shape[1] == STRIPS
    for ours, reference in (
        (from_strips(y_BSHWO), expected.detach().numpy().transpose(0, 2, 3, 1)),
        (from_strips(x_gradient), x_BCHW.grad.numpy().transpose(0, 2, 3, 1)),
        (weight_gradient, from_torch_layout(kernel.grad.numpy(), CONV)),
    ):
        assert ours.shape == reference.shape
        assert np.linalg.norm(ours - reference) <= 1e-5 * np.linalg.norm(reference)
