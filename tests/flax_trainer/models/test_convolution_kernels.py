"""Convolutions in all their forms against PyTorch's."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from flax_trainer.distributed.mesh import DATA, MeshEngine
from flax_trainer.models.controlnet import ControlNetConditioningEmbedding
from flax_trainer.models.kernels.convolution import (
    ENOUGH_IMAGES,
    convolve,
    has_few_images,
    to_blocks,
    weight_for_blocks,
)
from flax_trainer.models.layers.compute import Compute
from flax_trainer.models.params import CONV, from_torch_layout, split

Arrays = tuple[np.ndarray, ...]


def draw(*shapes: tuple[int, ...]) -> Arrays:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def torch_convolution(x_BHWC: np.ndarray, weight_OIHW: np.ndarray, stride: int, padding: tuple[int, int]) -> Arrays:
    """The result, and the gradients of half its squares' sum by input and kernel."""
    x = torch.from_numpy(x_BHWC.transpose(0, 3, 1, 2).copy()).requires_grad_()
    weight = torch.from_numpy(weight_OIHW).requires_grad_()
    y = torch.nn.functional.conv2d(torch.nn.functional.pad(x, padding * 2), weight, stride=stride)
    (y.square().sum() / 2).backward()
    assert x.grad is not None
    assert weight.grad is not None
    return (
        y.detach().numpy().transpose(0, 2, 3, 1),
        x.grad.numpy().transpose(0, 2, 3, 1),
        from_torch_layout(weight.grad.numpy(), CONV),
    )


def assert_close(ours: Any, reference: Arrays, tolerance: float = 1e-5) -> None:
    for array, expected in zip(ours, reference, strict=True):
        assert array.shape == expected.shape
        assert np.linalg.norm(array - expected) <= tolerance * np.linalg.norm(expected)


@given(
    batch=st.sampled_from([1, 2, ENOUGH_IMAGES]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel_size=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([(0, 0), (1, 1), (0, 1)]),
    for_tpu=st.booleans(),
)
@example(batch=2, height=8, width=6, kernel_size=3, stride=1, padding=(1, 1), for_tpu=True)
@example(batch=2, height=8, width=6, kernel_size=3, stride=1, padding=(1, 1), for_tpu=False)
@example(batch=2, height=7, width=9, kernel_size=3, stride=2, padding=(1, 1), for_tpu=True)
@example(batch=2, height=7, width=8, kernel_size=3, stride=2, padding=(1, 1), for_tpu=False)
@example(batch=ENOUGH_IMAGES, height=6, width=8, kernel_size=3, stride=2, padding=(1, 1), for_tpu=True)
@example(batch=1, height=9, width=9, kernel_size=3, stride=2, padding=(0, 1), for_tpu=True)  # the VAE's downsampler
@example(batch=1, height=8, width=6, kernel_size=3, stride=2, padding=(0, 1), for_tpu=False)
@example(batch=1, height=7, width=9, kernel_size=3, stride=2, padding=(0, 1), for_tpu=False)
@example(batch=1, height=7, width=8, kernel_size=3, stride=1, padding=(0, 1), for_tpu=False)
@example(batch=2, height=1, width=1, kernel_size=3, stride=1, padding=(1, 1), for_tpu=True)
@settings(max_examples=8, deadline=None)
def test_every_form_is_the_convolution(
    batch: int, height: int, width: int, kernel_size: int, stride: int, padding: tuple[int, int], for_tpu: bool
) -> None:
    assume(min(height, width) + sum(padding) >= kernel_size)
    x_BHWC, weight_OIHW = draw((batch, height, width, 5), (7, 5, kernel_size, kernel_size))
    function = partial(convolve, stride=stride, padding=padding, for_tpu=for_tpu)
    y, gradients_of = jax.vjp(function, jnp.asarray(x_BHWC), jnp.asarray(from_torch_layout(weight_OIHW, CONV)))
    assert_close((y, *gradients_of(y)), torch_convolution(x_BHWC, weight_OIHW, stride, padding))


def test_columns_are_added_up_in_float32() -> None:
    """In bfloat16, 256 + 1 is 256: a sum of rounded columns would lose the ones at either side."""
    x_BHWC = jnp.asarray([1.0, 256.0, 1.0], jnp.bfloat16).reshape(1, 1, 3, 1)
    weight_QPCO = jnp.ones((3, 3, 1, 1), jnp.bfloat16)
    assert convolve(x_BHWC, weight_QPCO, 1, (1, 1), for_tpu=True)[0, 0, 1, 0] == 258


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_blocks_hold_the_pixels_as_they_are(block: int, dtype: str) -> None:
    (x_BHWC,) = draw((2, 8, 12, 3))
    x_BHWC = np.asarray(jnp.asarray(x_BHWC, dtype))
    x_BHKWKC = x_BHWC.reshape(2, 8 // block, block, 12 // block, block, 3)
    expected = x_BHKWKC.swapaxes(2, 3).reshape(2, 8 // block, 12 // block, -1)
    np.testing.assert_array_equal(to_blocks(jnp.asarray(x_BHWC), block), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_convolved_are_the_pixels_convolved(stride: int) -> None:
    block = 4
    x_BHWC, weight_OIHW = draw((2, 16, 24, 3), (5, 3, 3, 3))

    def on_blocks(x_BHWC: jax.Array, weight_QPCO: jax.Array) -> jax.Array:
        weight = weight_for_blocks(weight_QPCO, stride, block)
        return convolve(to_blocks(x_BHWC, block), weight, stride=1, padding=(1, 1), for_tpu=False)

    y, gradients_of = jax.vjp(on_blocks, jnp.asarray(x_BHWC), jnp.asarray(from_torch_layout(weight_OIHW, CONV)))
    expected, *gradients = torch_convolution(x_BHWC, weight_OIHW, stride, padding=(1, 1))
    assert_close((y, *gradients_of(y)), (np.asarray(to_blocks(jnp.asarray(expected), block // stride)), *gradients))


@pytest.mark.parametrize(
    ("height", "width", "channels", "widths", "kernels"),
    [
        pytest.param(32, 48, 3, (4, 8, 8, 12), {(4 * 4 * 3, 4 * 4 * 4), (4 * 4 * 4, 2 * 2 * 8)}, id="in-blocks"),
        pytest.param(32, 48, 1, (4, 8, 8, 12), {(4 * 4 * 1, 4 * 4 * 4), (4 * 4 * 4, 2 * 2 * 8)}, id="grey-in-blocks"),
        pytest.param(31, 48, 3, (4, 8, 8, 12), {(3, 4), (4, 4)}, id="odd-height"),
        pytest.param(32, 48, 3, (4, 8), {(3, 4), (4, 4)}, id="one-reduction"),
    ],
)
def test_the_conditioning_network_begins_in_blocks_where_it_can(
    height: int, width: int, channels: int, widths: tuple[int, ...], kernels: set[tuple[int, int]]
) -> None:
    definitions = {
        for_tpu: split(ControlNetConditioningEmbedding(channels, widths, 8, Compute(tpu_convolutions=for_tpu)))
        for for_tpu in (False, True)
    }
    _, params = definitions[True]
    drawn = draw(*(value.shape for value in params.values()))
    values = {name: jnp.asarray(value) for name, value in zip(params, drawn, strict=True)}
    (condition_BYXC,) = draw((ENOUGH_IMAGES, height, width, channels))  # enough for convolutions in one piece

    def run(for_tpu: bool) -> Any:
        return definitions[for_tpu][0].bind(values)

    program = jax.make_jaxpr(run(for_tpu=True))(condition_BYXC)
    used = {
        equation.invars[1].aval.shape[2:]
        for equation in program.eqns
        if equation.primitive.name == "conv_general_dilated"
    }
    assert kernels <= used
    assert_close([run(for_tpu=True)(condition_BYXC)], (np.asarray(run(for_tpu=False)(condition_BYXC)),))


def test_images_are_counted_per_device() -> None:
    few, enough = (jax.ShapeDtypeStruct((images, 8, 8, 4), jnp.float32) for images in (7, 8))
    assert jax.eval_shape(lambda x: x[: has_few_images(x)], few).shape[0] == 1
    assert jax.eval_shape(lambda x: x[: has_few_images(x)], enough).shape[0] == 0
    mesh = MeshEngine.over(jax.devices(), 2).mesh
    with use_abstract_mesh(mesh.abstract_mesh):
        assert has_few_images(jnp.zeros((8 * 8 - 1, 1, 1, 1)))
        assert not has_few_images(jnp.zeros((8 * 8, 1, 1, 1)))


def test_rows_that_are_divided_over_devices_stay_where_they_are() -> None:
    """XLA finds the division of the rows through the form that makes them one axis with the width."""
    mesh = MeshEngine.over(jax.devices(), 1).mesh
    rows = NamedSharding(mesh, PartitionSpec(DATA))
    x_BHWC, weight_OIHW = draw((8, 6, 6, 4), (4, 4, 3, 3))
    weight_QPCO = jnp.asarray(from_torch_layout(weight_OIHW, CONV))
    compiled = jax.jit(partial(convolve, stride=1, padding=(1, 1), for_tpu=True), in_shardings=(rows, None))
    compiled = compiled.lower(x_BHWC, weight_QPCO).compile()
    y = compiled(jax.device_put(x_BHWC, rows), weight_QPCO)
    assert y.sharding.is_equivalent_to(rows, y.ndim)
    assert "all-gather" not in (compiled.as_text() or "")
    assert_close([np.asarray(y)], torch_convolution(x_BHWC, weight_OIHW, 1, (1, 1))[:1])


def test_off_tpus_every_padding_is_the_same_on_both_sides() -> None:
    """cuDNN knows no other."""
    x_BHWC, weight_QPCO = jnp.zeros((1, 8, 8, 5)), jnp.zeros((3, 3, 5, 7))
    for stride in (1, 2):
        program = jax.make_jaxpr(partial(convolve, stride=stride, padding=(0, 1), for_tpu=False))(x_BHWC, weight_QPCO)
        paddings = re.findall(r"padding=\(\((\d), (\d)\), \((\d), (\d)\)\)", str(program))
        assert paddings
        assert all(len(set(padding)) == 1 for padding in paddings)
