"""Arrays on their way to the devices and back, on eight simulated ones.

Axes: N devices, A accumulation slices, R rows, B rows per device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_trainer.distributed.pmap import AXIS, PmapEngine

N = 8
ENGINE = PmapEngine()
ARRAYS = {
    "params": {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 3), np.float32)},
    "step": np.array(7, np.int32),
    "non_finite": np.array(True),
    "half": np.array([1.5, np.nan, -np.inf], jnp.bfloat16),
}
sizes = st.integers(1, 3)


def rows(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


def assert_same(left: object, right: object) -> None:
    """Bit for bit, with types and shapes."""
    assert str(jax.tree.structure(left)) == str(jax.tree.structure(right))
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_there_are_eight_devices() -> None:
    assert jax.local_device_count() == N


def test_every_device_holds_a_whole_copy() -> None:
    for original, copies in zip(jax.tree.leaves(ARRAYS), jax.tree.leaves(ENGINE.place_state(ARRAYS)), strict=True):
        assert copies.shape == (N, *original.shape)
        assert {shard.device for shard in copies.addressable_shards} == set(jax.local_devices())
        for shard in copies.addressable_shards:
            assert_same(np.asarray(shard.data)[0], original)


def test_what_is_fetched_is_what_was_replicated() -> None:
    fetched = ENGINE.fetch(ENGINE.place_state(ARRAYS))
    assert all(isinstance(array, np.ndarray) for array in jax.tree.leaves(fetched))
    assert_same(fetched, ARRAYS)


def test_donated_steps_do_not_reach_the_arrays_that_were_replicated() -> None:
    """On CPUs a device may use a numpy array where it lies, if that begins at a multiple of 64 bytes."""
    buffer = np.zeros(1000 + 16, np.float32)
    begin = -buffer.ctypes.data // 4 % 16
    mine = buffer[begin : begin + 1000]
    assert mine.ctypes.data % 64 == 0
    step = jax.pmap(lambda x: x + 1, donate_argnums=(0,))
    after = step(step(ENGINE.place_state(mine)))
    np.testing.assert_array_equal(np.asarray(after), np.full((N, 1000), 2, np.float32))
    np.testing.assert_array_equal(buffer, 0)


def test_a_fetched_state_survives_the_steps_that_follow() -> None:
    """It is saved in the background while donated buffers are written again."""
    step = jax.pmap(lambda x: x + 1, axis_name=AXIS, donate_argnums=(0,))
    state = ENGINE.place_state(np.zeros((256, 256), np.float32))
    state = step(state)
    fetched = ENGINE.fetch(state)
    for _ in range(10):
        state = step(state)
    np.testing.assert_array_equal(fetched, 1)
    np.testing.assert_array_equal(ENGINE.fetch(state), 11)


def test_a_pmapped_step_takes_the_arrays_as_they_lie() -> None:
    """Without moving anything: pmap's own layout is the one they have, so donation works and nothing is copied."""
    state: dict[str, Any] = ENGINE.place_state({"w": np.float32(2)})
    batch = ENGINE.place_batch({"x": rows(3, N * 2).astype(np.float32)})
    step = jax.pmap(
        lambda state, batch: {"w": state["w"] * jax.lax.pmean(batch["x"].mean(), AXIS)},
        axis_name=AXIS,
        donate_argnums=(0,),
    )
    with jax.transfer_guard("disallow"):
        after = step(state, batch)
    assert state["w"].is_deleted()
    assert ENGINE.fetch(after)["w"] == 2 * np.mean(np.arange(3 * N * 2))


@settings(deadline=None, max_examples=20)
@given(sizes, sizes, st.lists(sizes, max_size=2))
def test_each_device_gets_its_rows_of_every_slice(slices: int, per_device: int, rest: list[int]) -> None:
    batch_AR = rows(slices, N * per_device, *rest)
    on_devices = ENGINE.place_batch({"x": batch_AR})["x"]
    assert on_devices.shape == (N, slices, per_device, *rest)
    for number, device in enumerate(jax.local_devices()):
        (here,) = [shard.data for shard in on_devices.addressable_shards if shard.device == device]
        expected = batch_AR[:, number * per_device : (number + 1) * per_device]
        np.testing.assert_array_equal(np.asarray(here)[0], expected)


@settings(deadline=None, max_examples=5)
@given(sizes, st.lists(sizes, max_size=1))
def test_rows_are_divided_between_the_devices_and_come_back_in_order(per_device: int, rest: list[int]) -> None:
    array_R = rows(N * per_device, *rest)
    params, frozen = ENGINE.place_state({"w": np.int32(3)}), ENGINE.place_frozen({"b": np.int32(1)})

    def on_a_device(params: Any, frozen: Any, rows: Any) -> jax.Array:
        assert rows["x"].shape == (per_device, *rest)
        return rows["x"] * params["w"] + frozen["b"]

    result = ENGINE.compile_for_rows(on_a_device)(params, frozen, {"x": array_R})
    np.testing.assert_array_equal(result, array_R * 3 + 1)


@pytest.mark.parametrize("count", [1, 7, 12])
def test_rows_that_cannot_be_shared_out_are_a_bug(count: int) -> None:
    same = ENGINE.compile_for_rows(lambda params, frozen, rows: rows)
    with pytest.raises(AssertionError):
        same(ENGINE.place_state({}), {}, rows(count, 2))
    with pytest.raises(AssertionError):
        ENGINE.place_batch({"x": rows(2, count, 2)})
