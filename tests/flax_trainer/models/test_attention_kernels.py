"""Every way to compute attention against PyTorch's, values and gradients, and what it holds in memory.

Axes: B batch, Q query positions, K key positions, N heads, D head features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from flax_trainer.models.kernels.attention import (
    AttentionKernel,
    blockwise_attention,
    dot_product_attention,
    flash_attention_tpu,
    memory_efficient_kernel,
)

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
AttentionFunction = Callable[..., jax.Array]
interpreted_flash_attention = partial(flash_attention_tpu, interpret=True)


@dataclass
class Device:
    """As much of a `jax.Device` as tells which attention suits it."""

    platform: str
    device_kind: str
    compute_capability: str = ""


def inputs(batch: int, queries: int, keys: int, heads: int, features: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    query, key, value = (
        rng.standard_normal((batch, length, heads, features), np.float32) for length in (queries, keys, keys)
    )
    return 2 * query, 2 * key, value  # logits of both clear winners and near ties


def cotangent(query: np.ndarray) -> np.ndarray:
    return np.random.default_rng(99).standard_normal(query.shape, np.float32)


def torch_attention(arrays: Arrays) -> list[np.ndarray]:
    """Output and gradients of the query, the key and the value, in float64."""
    leaves = [torch.from_numpy(array).double().requires_grad_() for array in arrays]
    output = torch.nn.functional.scaled_dot_product_attention(*(leaf.transpose(1, 2) for leaf in leaves))
    output = output.transpose(1, 2)
    output.backward(torch.from_numpy(cotangent(arrays[0])).double())
    return [output.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]


def flax_attention(attention: AttentionFunction, arrays: Arrays, dtype: str = "float32") -> list[jax.Array]:
    def output_and_gradients(query: jax.Array, key: jax.Array, value: jax.Array) -> list[jax.Array]:
        output, pull_back = jax.vjp(attention, query, key, value)
        return [output, *pull_back(jnp.asarray(cotangent(arrays[0]), dtype))]

    return jax.jit(output_and_gradients)(*(jnp.asarray(array, dtype) for array in arrays))


def relative_difference(ours: jax.Array, reference: np.ndarray) -> float:
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.linalg.norm(np.asarray(ours, np.float64) - reference) / np.linalg.norm(reference))


def assert_agree(ours: list[jax.Array], reference: list[np.ndarray], tolerance: float) -> None:
    differences = [relative_difference(*pair) for pair in zip(ours, reference, strict=True)]
    assert max(differences) < tolerance, dict(zip(("output", "query", "key", "value"), differences, strict=True))


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Every equation, those inside of loops, kernels and the like included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: isinstance(value, Jaxpr | ClosedJaxpr)):
            if isinstance(inner, ClosedJaxpr):
                yield from equations(inner.jaxpr)
            elif isinstance(inner, Jaxpr):
                yield from equations(inner)


def gradients_of(attention: AttentionFunction) -> Callable[..., Any]:
    return jax.grad(lambda *qkv: attention(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))


def gradients_program(attention: AttentionFunction, shape: tuple[int, ...], dtype: str, keys: int = 0) -> ClosedJaxpr:
    query = jax.ShapeDtypeStruct(shape, dtype)
    key = jax.ShapeDtypeStruct((shape[0], keys or shape[1], *shape[2:]), dtype)
    return jax.make_jaxpr(gradients_of(attention))(query, key, key)


def largest_array(program: ClosedJaxpr) -> int:
    """Elements of the largest array that the program makes."""
    return max(variable.aval.size for equation in equations(program.jaxpr) for variable in equation.outvars)


def primitives(program: ClosedJaxpr) -> set[str]:
    return {equation.primitive.name for equation in equations(program.jaxpr)}


# --- blockwise -------------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    heads=st.integers(1, 3),
    features=st.integers(1, 12),
    scores_per_block=st.integers(1, 2000),
)
@example(batch=2, queries=7, keys=5, heads=2, features=4, scores_per_block=1)  # a block for every query
@example(batch=1, queries=9, keys=4, heads=1, features=8, scores_per_block=16)  # a last block with one of four rows
@example(batch=1, queries=1, keys=1, heads=1, features=1, scores_per_block=1)
@settings(max_examples=8, deadline=None)
def test_blocks_of_any_size_give_the_attention_of_the_whole(
    batch: int, queries: int, keys: int, heads: int, features: int, scores_per_block: int
) -> None:
    arrays = inputs(batch, queries, keys, heads, features)
    attention = partial(blockwise_attention, scores_per_block=scores_per_block)
    output, reference = flax_attention(attention, arrays), torch_attention(arrays)
    if keys == 1:  # softmax over one key is constant: the query's and the key's gradients are zero
        np.testing.assert_allclose(output[1], 0, atol=1e-5)
        np.testing.assert_allclose(output[2], 0, atol=1e-4)
        output, reference = [output[0], output[3]], [reference[0], reference[3]]
        assert max(relative_difference(*pair) for pair in zip(output, reference, strict=True)) < 1e-5
    else:
        assert_agree(output, reference, 1e-5)


@pytest.mark.parametrize("kernel", ["plain", "blockwise"])
def test_float16_runs_here_too_and_sums_in_float32(kernel: AttentionKernel) -> None:
    """Its products have a name of their own, which XLA does not know on CPUs."""
    arrays = inputs(1, 30, 77, 2, 40)
    ours = flax_attention(partial(dot_product_attention, kernel=kernel), arrays, "float16")
    assert {array.dtype.name for array in ours} == {"float16"}
    assert_agree(ours, torch_attention(arrays), 5e-3)


def test_bfloat16_is_as_good_in_blocks_as_in_one() -> None:
    arrays = inputs(1, 100, 77, 2, 40)
    reference = torch_attention(arrays)
    plain = flax_attention(dot_product_attention, arrays, "bfloat16")
    blocks = flax_attention(partial(blockwise_attention, scores_per_block=2000), arrays, "bfloat16")
    assert {array.dtype.name for array in blocks} == {"bfloat16"}
    assert_agree(plain, reference, 0.02)
    assert_agree(blocks, reference, 0.02)


def test_blockwise_attention_never_holds_all_scores() -> None:
    """Of 4096 positions: neither the forward nor the backward pass makes an array with a score of every pair."""
    shape, scores = (1, 4096, 8, 40), 8 * 4096**2
    assert largest_array(gradients_program(dot_product_attention, shape, "float32")) == scores
    blockwise = gradients_program(partial(dot_product_attention, kernel="blockwise"), shape, "float32")
    assert largest_array(blockwise) <= scores / 8


def test_blocks_become_smaller_as_the_batch_grows() -> None:
    attention = partial(dot_product_attention, kernel="blockwise")
    one, eight = (gradients_program(attention, (batch, 4096, 8, 40), "float32") for batch in (1, 8))
    assert largest_array(eight) == largest_array(one)


def test_few_keys_need_no_blocks() -> None:
    """A caption's 77; but 4096 are many, whatever the head's size (the VAE's has 512 features)."""
    query, caption = (jax.ShapeDtypeStruct((8, length, 8, 40), jnp.float32) for length in (4096, 77))
    attention = gradients_of(partial(dot_product_attention, kernel="blockwise"))
    assert "scan" not in primitives(jax.make_jaxpr(attention)(query, caption, caption))
    one_head = jax.ShapeDtypeStruct((8, 4096, 1, 512), jnp.float32)
    for many in (query, one_head):
        assert "scan" in primitives(jax.make_jaxpr(attention)(many, many, many))


# --- splash ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "length", "heads", "features"),
    [(2, 128, 2, 40), (1, 768, 3, 64), (1, 4096, 1, 40), (1, 4096, 1, 160), (1, 256, 1, 512)],
)
def test_flash_attention_for_tpus_is_attention(batch: int, length: int, heads: int, features: int) -> None:
    arrays = inputs(batch, length, length, heads, features)
    assert_agree(flax_attention(interpreted_flash_attention, arrays), torch_attention(arrays), 1e-5)


def test_flash_attention_for_tpus_keeps_bfloat16() -> None:
    arrays = inputs(1, 256, 128, 2, 40)
    ours = flax_attention(interpreted_flash_attention, arrays, "bfloat16")
    assert {array.dtype.name for array in ours} == {"bfloat16"}
    assert_agree(ours, torch_attention(arrays), 0.02)


@pytest.mark.parametrize("configured", ["default", "tensorfloat32", "highest"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flash_attention_for_tpus_has_only_precisions_that_its_compiler_knows(configured: str, dtype: str) -> None:
    """In the forward pass and the kernel of the backward pass, which is traced later than the forward pass."""
    with jax.default_matmul_precision(configured):
        program = gradients_program(flash_attention_tpu, (1, 1024, 2, 40), dtype)
        lower_for_tpu = jax.export.export(jax.jit(gradients_of(flash_attention_tpu)), platforms=["tpu"])
        lower_for_tpu(*[jax.ShapeDtypeStruct((1, 1024, 2, 40), dtype)] * 3)  # raises for a precision that is not known
    kernels = [equation for equation in equations(program.jaxpr) if equation.primitive.name == "pallas_call"]
    products = [
        equation.params["precision"]
        for kernel in kernels
        for equation in equations(kernel.params["jaxpr"])
        if equation.primitive.name == "dot_general"
    ]
    wanted = jax.lax.Precision.HIGHEST if dtype == "float32" else jax.lax.Precision.DEFAULT
    assert len(kernels) == 2
    assert set(products) == {(wanted, wanted)}


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "kernel"),
    [
        (Device("tpu", "TPU v4"), "splash"),
        (Device("tpu", "TPU v5 lite"), "splash"),
        (Device("tpu", "TPU v6 lite"), "splash"),
        (Device("tpu", "TPU v3"), "blockwise"),
        (Device("gpu", "NVIDIA A100-SXM4-40GB", "8.0"), "cudnn"),
        (Device("gpu", "NVIDIA H100 80GB HBM3", "9.0"), "cudnn"),
        (Device("gpu", "Tesla T4", "7.5"), "blockwise"),
        (Device("cpu", "cpu"), "blockwise"),
    ],
)
def test_each_device_has_its_memory_efficient_attention(device: Any, kernel: str) -> None:
    assert memory_efficient_kernel(device) == kernel


def test_this_machines_memory_efficient_attention_is_blockwise() -> None:
    assert memory_efficient_kernel(jax.devices("cpu")[0]) == "blockwise"


@pytest.mark.parametrize(
    ("queries", "keys", "is_fused"),
    [
        (4096, 4096, True),
        (9216, 9216, True),  # 768 px
        (1024, 1024, True),
        (4096, 77, False),  # text
        (256, 256, False),
        (5184, 5184, False),  # 576 px: not a multiple of 128
    ],
)
def test_tpus_run_the_fused_kernel_on_long_self_attention_alone(queries: int, keys: int, is_fused: bool) -> None:
    program = gradients_program(
        partial(dot_product_attention, kernel="splash"), (1, queries, 2, 40), "bfloat16", keys=keys
    )
    assert ("pallas_call" in primitives(program)) is is_fused


@pytest.mark.parametrize(
    ("dtype", "features", "is_fused"),
    [
        ("bfloat16", 40, True),
        ("float16", 128, True),
        ("float32", 40, False),
        ("bfloat16", 160, False),
        ("bfloat16", 36, False),
    ],
)
def test_nvidia_gpus_run_cudnn_where_it_takes_dtype_and_head_size(
    monkeypatch: pytest.MonkeyPatch, dtype: str, features: int, is_fused: bool
) -> None:
    used = []

    def record(query: jax.Array, key: jax.Array, value: jax.Array, *, implementation: str, **_: object) -> jax.Array:
        used.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    arrays = [jnp.zeros((1, 64, 2, features), dtype)] * 3
    dot_product_attention(*arrays, kernel="cudnn")
    assert used == ["cudnn" if is_fused else "xla"]
