"""The TPU's kernels find room in a core's own memory, which no interpreter would notice."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from flax_trainer.compile_report.targets import parse_target
from flax_trainer.models.kernels.attention import dot_product_attention, flash_attention_tpu
from flax_trainer.models.kernels.feed_forward import FeedForwardParams, feed_forward_tpu

KERNEL = 'custom_call_target="tpu_custom_call"'


@pytest.mark.parametrize("target", ["v4-8", "v5e-1", "v6e-1"])
@pytest.mark.parametrize(
    ("length", "features", "dtype"),
    [
        (4096, 40, "bfloat16"),  # SD 1.5 at 512 px
        (1024, 80, "bfloat16"),
        (256, 160, "bfloat16"),
        (64, 160, "bfloat16"),
        (4096, 64, "bfloat16"),  # the most keys that our own kernel takes of a head
        (9216, 64, "bfloat16"),  # SD 2.1 at 768 px
        (4096, 40, "float32"),
        (4096, 80, "float32"),  # SD 1.5 at 1024 px, the second
        (4096, 160, "float32"),  # SD 1.5 at 4096 px, lowest resolution
        (4096, 128, "bfloat16"),
        (2048, 128, "float32"),
    ],
)
def test_forward_and_backward_passes_compile(target: str, length: int, features: int, dtype: str) -> None:
    device = parse_target(target).devices()[0]
    array = jax.ShapeDtypeStruct((2, length, 4, features), jnp.dtype(dtype), sharding=SingleDeviceSharding(device))

    def loss(*arrays: jax.Array) -> jax.Array:
        return flash_attention_tpu(*arrays).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, array, array).compile()
    assert (compiled.as_text() or "").count(KERNEL) == 2


@pytest.mark.parametrize("target", ["v4-8", "v5e-1", "v6e-1"])
@pytest.mark.parametrize(("queries", "features"), [(4096, 40), (64, 160)])
def test_attention_to_a_caption_compiles(target: str, queries: int, features: int) -> None:
    sharding = SingleDeviceSharding(parse_target(target).devices()[0])
    query, caption = (
        jax.ShapeDtypeStruct((2, length, 4, features), jnp.bfloat16, sharding=sharding) for length in (queries, 77)
    )

    def loss(*arrays: jax.Array) -> jax.Array:
        return flash_attention_tpu(*arrays).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, caption, caption).compile()
    assert (compiled.as_text() or "").count(KERNEL) == 2


@pytest.mark.parametrize("target", ["v4-8", "v5e-1", "v6e-1"])
@pytest.mark.parametrize("is_trained", [False, True])
def test_feed_forward_networks_compile(target: str, is_trained: bool) -> None:
    sharding, channels, inner = SingleDeviceSharding(parse_target(target).devices()[0]), 320, 1280

    def array(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=sharding)

    params = FeedForwardParams(
        array(channels),
        array(channels),
        array(channels, 2 * inner),
        array(2 * inner),
        array(inner, channels),
        array(channels),
    )

    def loss(x_BLC: jax.Array, params: FeedForwardParams) -> jax.Array:
        return feed_forward_tpu(x_BLC, params, 1e-5).astype(jnp.float32).sum()

    gradients = jax.grad(loss, argnums=(0, 1) if is_trained else 0)
    with jax.default_matmul_precision("highest"):  # which the kernels' compiler has not, of bfloat16 numbers
        compiled = jax.jit(gradients).lower(array(2, 4096, channels), params).compile()
    assert (compiled.as_text() or "").count(KERNEL) == 1  # of a sum's gradient, the forward pass is not needed


def test_float16_numbers_are_attended_to_without_the_kernel() -> None:
    """Which has no loads of them: `--mixed_precision fp16 --enable_xformers_memory_efficient_attention` would end."""
    device = parse_target("v4-8").devices()[0]
    array = jax.ShapeDtypeStruct((1, 4096, 2, 40), jnp.float16, sharding=SingleDeviceSharding(device))

    def loss(*arrays: jax.Array) -> jax.Array:
        return dot_product_attention(*arrays, kernel="splash").astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, array, array).compile()
    assert KERNEL not in (compiled.as_text() or "")
    scores = 4 * 2 * 4096**2
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < scores
