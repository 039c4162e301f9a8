"""The TPU's attention kernels find room in a core's own memory, which no interpreter would notice."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from flax_trainer.compile_report.targets import parse_target
from flax_trainer.models.attention_kernels import flash_attention_tpu


@pytest.mark.parametrize("target", ["v4-8", "v5e-1", "v6e-1"])
@pytest.mark.parametrize(
    ("length", "features", "dtype"),
    [
        (4096, 40, "bfloat16"),  # SD 1.5 at 512 px, highest resolution and the next
        (1024, 80, "bfloat16"),
        (9216, 64, "bfloat16"),  # SD 2.1 at 768 px
        (4096, 40, "float32"),
        (4096, 160, "float32"),  # SD 1.5 at 4096 px, lowest resolution
    ],
)
def test_forward_and_backward_passes_compile(target: str, length: int, features: int, dtype: str) -> None:
    device = parse_target(target).devices()[0]
    array = jax.ShapeDtypeStruct((1, length, 2, features), jnp.dtype(dtype), sharding=SingleDeviceSharding(device))

    def loss(*arrays: jax.Array) -> jax.Array:
        return flash_attention_tpu(*arrays).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, array, array).compile()
    assert (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"') == 2
