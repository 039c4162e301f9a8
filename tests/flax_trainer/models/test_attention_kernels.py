"""Every way to compute attention against PyTorch's, values and gradients, and what it holds in memory.

Axes: B batch, Q query positions, K key positions, N heads, D head features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from flax_trainer.models import FlaxAutoencoderKL, FlaxUNet2DConditionModel, UNet2DConditionConfig, vae
from flax_trainer.models.kernels import attention as attention_kernels
from flax_trainer.models.kernels.attention import (
    AttentionKernel,
    attention_kernel,
    blockwise_attention,
    dot_product_attention,
    flash_attention_tpu,
    plain_attention,
)
from flax_trainer.models.layers import transformer
from flax_trainer.models.params import split
from flax_trainer.random_model import ARCHITECTURES

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
AttentionFunction = Callable[..., jax.Array]
TEXT_LENGTH = 77
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


@pytest.mark.parametrize(
    ("queries", "keys", "features"), [(256, TEXT_LENGTH, 40), (64, 64, 160), (512, 1024, 80), (1024, 128, 64)]
)
def test_flash_attention_for_tpus_is_attention_to_other_positions(queries: int, keys: int, features: int) -> None:
    arrays = inputs(2, queries, keys, 2, features)
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
    ("device", "unasked", "asked_for"),
    [
        (Device("tpu", "TPU v4"), "splash", "splash"),
        (Device("tpu", "TPU v5 lite"), "splash", "splash"),
        (Device("tpu", "TPU v6 lite"), "splash", "splash"),
        (Device("tpu", "TPU v3"), "plain", "blockwise"),
        (Device("gpu", "NVIDIA A100-SXM4-40GB", "8.0"), "cudnn", "cudnn"),
        (Device("gpu", "NVIDIA L4", "8.9"), "cudnn", "cudnn"),
        (Device("gpu", "NVIDIA H100 80GB HBM3", "9.0"), "cudnn_sm90", "cudnn_sm90"),
        (Device("gpu", "NVIDIA B200", "10.0"), "cudnn_sm90", "cudnn_sm90"),
        (Device("gpu", "Tesla T4", "7.5"), "plain", "blockwise"),
        (Device("gpu", "AMD Instinct MI300X"), "plain", "blockwise"),
        (Device("cpu", "cpu"), "plain", "blockwise"),
    ],
)
def test_a_device_has_its_fused_attention_without_being_asked(device: Any, unasked: str, asked_for: str) -> None:
    assert attention_kernel(None, device) == unasked
    assert attention_kernel(True, device) == asked_for
    assert attention_kernel(False, device) == "plain"


def test_this_machine_computes_attention_plainly_or_in_blocks() -> None:
    assert attention_kernel(None, jax.devices("cpu")[0]) == "plain"
    assert attention_kernel(True, jax.devices("cpu")[0]) == "blockwise"


@pytest.mark.parametrize(
    ("queries", "keys", "is_fused"),
    [
        (4096, 4096, True),
        (9216, 9216, True),  # 768 px
        (1024, 1024, True),
        (4096, 77, True),  # text
        (256, 256, True),
        (64, 64, True),
        (1024, 324, False),
        (324, 77, False),
        (5184, 5184, False),  # 576 px: not a multiple of 128
    ],
)
def test_tpus_run_the_fused_kernels_where_they_have_blocks(queries: int, keys: int, is_fused: bool) -> None:
    program = gradients_program(
        partial(dot_product_attention, kernel="splash"), (1, queries, 2, 40), "bfloat16", keys=keys
    )
    assert ("pallas_call" in primitives(program)) is is_fused


class Shape(NamedTuple):
    """Of an attention: positions of the queries and of the keys, and features of a head."""

    queries: int
    keys: int
    features: int


def attentions_of(name: str, resolution: int) -> set[Shape]:
    """Those of a published model's UNet, and so of its ControlNet, and of its VAE's encoder, by its configuration."""
    unet = UNet2DConditionConfig.from_dict(ARCHITECTURES[name].unet)
    levels = len(unet.block_out_channels)
    sides = [resolution // 8]
    while len(sides) < levels:
        sides.append(-(-sides[-1] // 2))
    has_attention = ["Attn" in kind for kind in unet.down_block_types]
    shapes = {Shape(sides[0] ** 2, sides[0] ** 2, ARCHITECTURES[name].vae["block_out_channels"][-1])}
    mid_block = levels - 1
    for level in {mid_block, *(level for level in range(levels) if has_attention[level])}:
        length, features = sides[level] ** 2, unet.block_out_channels[level] // unet.heads_per_block[level]
        shapes |= {Shape(length, length, features), Shape(length, TEXT_LENGTH, features)}
    return shapes


def attend(shape: Shape, dtype: str, kernel: AttentionKernel) -> None:
    query = jax.ShapeDtypeStruct((2, shape.queries, 4, shape.features), dtype)
    key = jax.ShapeDtypeStruct((2, shape.keys, 4, shape.features), dtype)
    jax.eval_shape(partial(dot_product_attention, kernel=kernel), query, key, key)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The implementations that JAX is asked for, which are not run."""
    asked_for: list[str] = []

    def record(
        query: jax.Array, key: jax.Array, value: jax.Array, *, implementation: str = "xla", **_: jax.Array
    ) -> jax.Array:
        asked_for.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    # A function of this test's own: JAX remembers what it has traced of one.
    monkeypatch.setattr(attention_kernels, "plain_attention", lambda *arrays: record(*arrays))
    return asked_for


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_the_attentions_of_published_models_are_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a size that no power of two divides, so that every length is odd."""
    seen = set()

    def record(query: jax.Array, key: jax.Array, value: jax.Array, kernel: AttentionKernel = "plain") -> jax.Array:
        seen.add(Shape(query.shape[1], key.shape[1], query.shape[3]))
        return query

    monkeypatch.setattr(transformer, "dot_product_attention", record)
    monkeypatch.setattr(vae, "dot_product_attention", record)
    architecture = ARCHITECTURES[name]
    latents, pixels = jnp.zeros((1, 65, 65, 4)), jnp.zeros((1, 520, 520, 3))
    text = jnp.zeros((1, TEXT_LENGTH, architecture.unet["cross_attention_dim"]))
    added = {"text_embeds": jnp.zeros((1, 1280)), "time_ids": jnp.zeros((1, 6))}
    unet, params = split(FlaxUNet2DConditionModel.abstract(architecture.unet))
    jax.eval_shape(lambda params: unet.bind(params)(latents, jnp.zeros(1), text, added_cond_kwargs=added), params)
    encoder, params = split(FlaxAutoencoderKL.abstract(architecture.vae))
    jax.eval_shape(lambda params: encoder.bind(params).encode(pixels), params)
    assert seen == attentions_of(name, 520)


@pytest.mark.parametrize(("kernel", "capability"), [("cudnn", 8.0), ("cudnn", 8.9), ("cudnn_sm90", 9.0)])
def test_cudnn_gets_exactly_what_it_takes(
    kernel: AttentionKernel, capability: float, fused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By JAX's own check, where it is strictest: in training, with a bias."""
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: capability >= float(least))
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    shapes = {
        shape
        for name in ("sd15", "sd21", "sdxl")
        for resolution in (512, 520, 576, 640, 768, 1024)
        for shape in attentions_of(name, resolution)
    }
    taken = set()
    for shape in {*shapes, Shape(64, 64, 36), Shape(64, 64, 256)}:
        even_keys = shape.keys + shape.keys % 2  # one more is masked
        query, key = (np.empty((2, length, 4, shape.features), np.float16) for length in (shape.queries, even_keys))
        layout = cudnn.AttentionLayout.BTNH.value
        try:
            cudnn.check_is_flash_attention(query, key, key, layout, 91100, has_bias=True, is_training=True)
        except NotImplementedError:
            expected = "xla"
        else:
            expected = "cudnn"
            taken.add(shape.features)
        for dtype in ("bfloat16", "float16"):
            fused.clear()
            attend(shape, dtype, kernel)
            assert set(fused) == {expected}, shape
        fused.clear()
        attend(shape, "float32", kernel)
        assert set(fused) == {"xla"}
    assert taken == ({40, 64, 80, 160, 256} if kernel == "cudnn_sm90" else {40, 64, 80})


def test_a_key_that_makes_their_number_even_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, where JAX's own attention stands for cuDNN's, which takes the same arguments."""
    even = jax.nn.dot_product_attention

    def in_place_of_cudnn(*arrays: jax.Array, implementation: str, **lengths: jax.Array) -> jax.Array:
        assert implementation == "cudnn"
        assert arrays[1].shape[1] == TEXT_LENGTH + 1
        return even(*arrays, implementation="xla", **lengths)

    arrays = [jnp.asarray(array, jnp.bfloat16) for array in inputs(2, 64, TEXT_LENGTH, 2, 40)]
    expected, expected_gradients = jax.vjp(plain_attention, *arrays)
    monkeypatch.setattr(jax.nn, "dot_product_attention", in_place_of_cudnn)
    y, gradients_of = jax.vjp(partial(dot_product_attention, kernel="cudnn"), *arrays)
    np.testing.assert_array_equal(y, expected)
    for gradient, reference in zip(gradients_of(y), expected_gradients(y), strict=True):
        assert gradient.shape == reference.shape
        np.testing.assert_allclose(np.float32(gradient), np.float32(reference), rtol=1e-2, atol=1e-3)
