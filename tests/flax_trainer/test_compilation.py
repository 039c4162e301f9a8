"""A step compiled in the background: as right as one compiled on its first call, once, and with its errors."""

import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_trainer.compilation import CompiledAhead

DEVICES = 8  # tests/conftest.py
SHARDING = NamedSharding(Mesh(np.array(jax.local_devices()), ("batch",)), PartitionSpec("batch"))


class Traced:
    """A step that counts how often it is traced, and in which thread."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def __call__(self, state: jax.Array, rows: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        self.threads.append(threading.current_thread())
        return state - rate * rows.mean(0), rows.sum()


def placed(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, jax.Array]:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return values, jax.device_put(values, SHARDING)


@pytest.mark.parametrize("engine", ["pmap", "jit"])
def test_a_step_with_donated_divided_arguments(engine: str) -> None:
    traced = Traced()
    compile_ = {
        "pmap": lambda: jax.pmap(traced, axis_name="batch", in_axes=(0, 0, None), donate_argnums=(0,)),
        "jit": lambda: jax.jit(jax.vmap(traced, in_axes=(0, 0, None)), donate_argnums=(0,)),
    }[engine]
    step: Any = CompiledAhead(compile_())
    host_state, state = placed((DEVICES, 4), seed=0)
    host_rows, rows = placed((DEVICES, 3, 4), seed=1)
    step.compile_for(state, rows, np.float32(0))

    for rate in (0.5, 0.25):
        donated = state
        state, sums = step(state, rows, np.float32(rate))
        host_state = host_state - np.float32(rate) * host_rows.mean(1)
        np.testing.assert_allclose(state, host_state, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(sums, host_rows.sum((1, 2)), rtol=1e-5, atol=1e-5)
        assert donated.is_deleted(), "the memory of the state before was not reused"
    assert len(set(traced.threads)) == 1
    assert traced.threads[0] is not threading.main_thread()
    assert len(traced.threads) == 1, "compiled more than once"
    assert "HloModule" in step.text()


def test_the_example_need_not_live_on() -> None:
    step: Any = CompiledAhead(jax.jit(lambda x: x + 1, donate_argnums=(0,)))
    example = jnp.zeros(3)
    step.compile_for(example)
    example.delete()
    np.testing.assert_array_equal(step(jnp.zeros(3)), np.ones(3))


def test_what_compiling_raises_the_first_step_raises() -> None:
    def wrong(x: jax.Array) -> jax.Array:
        raise ValueError("this model has no such layer")

    step: Any = CompiledAhead(jax.jit(wrong))
    step.compile_for(jnp.zeros(3))
    with pytest.raises(ValueError, match="no such layer"):
        step(jnp.zeros(3))


def test_other_shapes_are_an_error_and_no_second_compilation() -> None:
    step: Any = CompiledAhead(jax.jit(lambda x: x + 1))
    step.compile_for(jnp.zeros(3))
    with pytest.raises(TypeError):
        step(jnp.zeros(4))


def test_pictures_of_several_sizes_have_a_program_each_made_one_after_the_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    running, most_at_once = [0], []

    def traced(x: jax.Array) -> jax.Array:
        running[0] += 1
        most_at_once.append(running[0])
        time.sleep(0.05)
        running[0] -= 1
        return x.sum()

    step: Any = CompiledAhead(jax.jit(traced))
    sizes = [(48, 80), (64, 64), (80, 48)]
    caplog.set_level("INFO", "flax_trainer.compilation")
    for width, height in sizes:
        step.compile_for(jnp.zeros((height, width)), size=(width, height))
    step.wait()
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        f"The training step is compiled for pictures of {width}x{height}" for width, height in sizes
    ]
    for width, height in sizes * 2:
        assert step(jnp.ones((height, width)), size=(width, height)) == width * height
    assert most_at_once == [1, 1, 1], "compiled side by side, or again"
    assert step.text() == "", "operations of several programs have the same names"


def test_what_compiling_raises_ends_the_waiting_and_what_was_to_follow() -> None:
    def wrong(x: jax.Array) -> jax.Array:
        traced.append(x.shape)
        raise ValueError("this model has no such layer")

    traced: list[tuple[int, ...]] = []
    step: Any = CompiledAhead(jax.jit(wrong))
    for size in ((8, 8), (16, 8)):
        step.compile_for(jnp.zeros(size), size=size)
    with pytest.raises(ValueError, match="no such layer"):
        step.wait()
    with pytest.raises(ValueError, match="no such layer"):
        step(jnp.zeros((16, 8)), size=(16, 8))
    assert traced == [(8, 8)]
