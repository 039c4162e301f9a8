"""A divided state and whole batches on eight simulated devices.

Axes: A accumulation slices, R rows.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from flax_trainer.base_models import load_base_models
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints
from flax_trainer.distributed.engine import Engine
from flax_trainer.distributed.mesh import FSDP, SMALLEST_DIVIDED, WHOLE, MeshEngine, spec_of
from flax_trainer.distributed.pmap import PmapEngine
from flax_trainer.evaluation.image_sampler import ImageSampler
from flax_trainer.models.kernels.attention import dot_product_attention
from flax_trainer.training.optimizer import AdamWSettings
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import Objective, make_train_step
from shared.checkpoints.policy import checkpoint_record
from shared.config import TrainConfig
from shared.data.tokenization import PromptInputs
from shared.diffusion.drawing import Drawing
from shared.diffusion.samplers import unipc_plan
from shared.diffusion.schedule import NoiseSchedule
from tests.flax_trainer.training.stand_in_models import NOTHING_FROZEN, STAND_INS, StandIn, batch_of

N = 8
RECORD = checkpoint_record(TrainConfig(), {"location": ["a.tar"], "samples": 8}, 8)
sizes = st.integers(1, 3)


@pytest.fixture(params=[1, 2, 8], ids=lambda fsdp: f"{N // fsdp}x{fsdp}")
def engine(request: pytest.FixtureRequest) -> MeshEngine:
    return MeshEngine.over(jax.devices(), request.param)


def arrays(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "conv.weight": rng.standard_normal((3, 3, 40, 64), np.float32),
            "odd.weight": rng.standard_normal((67, 71), np.float32),
            "norm.bias": rng.standard_normal(64, np.float32),
        },
        "nothing": {},
        "step": np.array(7, np.int32),
        "non_finite": np.array(True),
        "half": np.full((64, 64), np.nan, jnp.bfloat16),
    }


def assert_same(left: object, right: object) -> None:
    """Bit for bit, with types and shapes."""
    assert str(jax.tree.structure(left)) == str(jax.tree.structure(right))
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, b.tobytes())


def bytes_per_device(tree: Any) -> set[int]:
    """What each of the devices holds of a tree."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "devices", "spec"),
    [
        ((3, 3, 320, 640), 4, PartitionSpec(None, None, None, FSDP)),
        ((3, 3, 640, 320), 4, PartitionSpec(None, None, FSDP)),
        ((3, 3, 4, 320), 8, PartitionSpec(None, None, None, FSDP)),
        ((1280, 320), 8, PartitionSpec(FSDP)),
        ((3, 3, 1281, 320), 8, PartitionSpec(None, None, None, FSDP)),
        ((67, 71), 8, WHOLE),
        ((1280,), 8, WHOLE),
        ((), 8, WHOLE),
    ],
)
def test_the_largest_axis_that_can_be_divided_is(shape: tuple[int, ...], devices: int, spec: PartitionSpec) -> None:
    assert spec_of(shape, devices) == spec


@given(st.lists(st.integers(1, 300), max_size=4), st.sampled_from([1, 2, 4, 8]))
def test_what_is_divided_is_large_and_divided_evenly(shape: list[int], devices: int) -> None:
    spec = spec_of(tuple(shape), devices)
    divided = [axis for axis, name in enumerate(spec) if name == FSDP]
    assert len(divided) <= 1
    for axis in divided:
        assert shape[axis] % devices == 0
        assert np.prod(shape) >= SMALLEST_DIVIDED


@pytest.mark.parametrize("devices", [3, 5, 16])
def test_groups_that_do_not_divide_the_devices_are_refused(devices: int) -> None:
    with pytest.raises(ValueError, match=f"--fsdp_devices is {devices}, but the run has 8 devices.*one of 1, 2, 4, 8"):
        MeshEngine.over(jax.devices(), devices)


# --- there and back --------------------------------------------------------------------------------------------------


def test_what_is_fetched_is_what_was_placed(engine: MeshEngine) -> None:
    for place in (engine.place_state, engine.place_frozen):
        fetched = engine.fetch(place(arrays()))
        assert all(isinstance(array, np.ndarray) for array in jax.tree.leaves(fetched))
        assert_same(fetched, arrays())


def test_devices_hold_their_share_of_what_is_trained_and_all_of_what_is_not(engine: MeshEngine) -> None:
    fsdp, whole = engine.mesh.shape[FSDP], arrays()
    divided = {"conv.weight": whole["params"]["conv.weight"], "half": whole["half"]}
    assert bytes_per_device(engine.place_state(divided)) == {sum(array.nbytes for array in divided.values()) // fsdp}
    assert bytes_per_device(engine.place_frozen(whole)) == {sum(leaf.nbytes for leaf in jax.tree.leaves(whole))}


def test_donated_steps_do_not_reach_the_arrays_that_were_placed(engine: MeshEngine) -> None:
    """On CPUs a device may use a numpy array where it lies, if that begins at a multiple of 64 bytes."""
    buffer = np.zeros(8192 + 16, np.float32)
    begin = -buffer.ctypes.data // 4 % 16
    mine = buffer[begin : begin + 8192]
    step = jax.jit(lambda x: x + 1, donate_argnums=(0,))
    after = step(step(engine.place_state(mine)))
    np.testing.assert_array_equal(np.asarray(after), 2)
    np.testing.assert_array_equal(buffer, 0)


@settings(deadline=None, max_examples=10)
@given(sizes, sizes, st.lists(sizes, max_size=2))
def test_each_device_gets_its_rows_of_every_slice(slices: int, per_device: int, rest: list[int]) -> None:
    engine = MeshEngine.over(jax.devices(), 2)
    batch_AR = np.arange(slices * N * per_device * int(np.prod(rest, dtype=int))).reshape(slices, -1, *rest)
    batch_AR = batch_AR.astype(np.int32)
    placed = engine.place_batch({"x": batch_AR})["x"]
    np.testing.assert_array_equal(np.asarray(placed), batch_AR)
    for number, device in enumerate(jax.devices()):
        (here,) = [shard.data for shard in placed.addressable_shards if shard.device == device]
        np.testing.assert_array_equal(np.asarray(here), batch_AR[:, number * per_device : (number + 1) * per_device])


def test_results_of_rows_come_back_whole_and_in_order(engine: MeshEngine) -> None:
    weight = arrays()["params"]["odd.weight"]
    params, frozen = engine.place_state({"w": weight}), engine.place_frozen({"b": np.float32(1)})
    rows_R = np.arange(2 * N * 67, dtype=np.float32).reshape(-1, 67)
    compiled = engine.compile_for_rows(lambda params, frozen, rows: rows["x"] @ params["w"] + frozen["b"])
    result = compiled(params, frozen, {"x": rows_R})
    assert isinstance(result, np.ndarray)
    np.testing.assert_allclose(result, rows_R @ weight + 1, rtol=1e-4, atol=1e-2)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_divided_state_is_saved_as_it_lies_and_restored_whole(engine: MeshEngine, tmp_path: Path) -> None:
    """While the steps that follow write over its donated buffers."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: -x, state), donate_argnums=(0,))
    params, mu, nu = (arrays(seed)["params"] for seed in range(3))
    original = TrainState(np.array(3, np.int32), params, mu, nu, np.array(False))
    moving = engine.place_state(original._replace(non_finite=np.array(0, np.int32)))
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(engine.to_save(moving), RECORD)
    for _ in range(5):
        moving = step(moving)
    checkpoints.wait()
    assert_same(checkpoints.restore(3, original), original)
    checkpoints.close()
    reader = Checkpoints(tmp_path, keep=None, read_only=True)
    assert_same(reader.restore(3, original), original)
    reader.close()


# --- steps and pictures ----------------------------------------------------------------------------------------------


def controlnet(params: Any) -> Any:
    """With an array that is divided and one that is not."""
    map_BHWC = params["large"].reshape(1, 8, 8, 64)
    return lambda *inputs, **_: (
        (),
        (map_BHWC * inputs[3][:, ::8, ::8, :1]).mean(-1, keepdims=True) + params["small"],
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_steps_are_those_of_pmap_and_leave_the_state_divided(base_model: Path, dtype: str) -> None:
    """Two accumulated slices, averaged weights and, in float16, a scaled loss."""
    defs = dataclasses.replace(STAND_INS, controlnet=StandIn(controlnet))
    objective = Objective(
        NoiseSchedule.from_pretrained(str(base_model)), np.ones(1000, np.float32), 1, jnp.dtype(dtype)
    )
    optimizer = AdamWSettings(0.9, 0.999, 1e-8, 0.01, max_grad_norm=0.1)
    start = TrainState.create(
        {"large": np.random.default_rng(0).standard_normal((64, 64), np.float32), "small": np.float32([[[0.5]]])},
        scales_loss=dtype == "float16",
        averages=True,
    )
    results: list[tuple[TrainState, dict[str, Any]]] = []
    engines: list[Engine] = [PmapEngine(), MeshEngine.over(jax.devices(), 8), MeshEngine.over(jax.devices(), 2)]
    for engine in engines:
        step = engine.compile_train_step(
            make_train_step(defs, objective, optimizer, gather_params=engine.gather_params, axis_name=engine.axis_name)
        )
        state, frozen, batch = engine.place_state(start), NOTHING_FROZEN, engine.place_batch(batch_of(2, N))
        at_rest, first = bytes_per_device(state), state.params["large"]
        for _ in range(3):
            state, metrics = step(state, frozen, batch, np.float32(1e-3))
        assert first.is_deleted()
        assert bytes_per_device(state) == at_rest
        assert isinstance(step.lower(state, frozen, batch, np.float32(1e-3)), jax.stages.Lowered)
        if isinstance(engine, MeshEngine):
            assert step._cache_size() == 1, "its results are laid out otherwise than what it began with"
        results.append((engine.fetch(state), engine.fetch(metrics)))

    (expected, expected_metrics), *others = results
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for result, metrics in others:
        assert metrics.keys() == expected_metrics.keys()
        for name, value in expected_metrics.items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=tolerance)
        for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
            difference = np.float64(one) - np.float64(other)
            assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(np.float64(other))


def test_pictures_are_those_of_pmap(base_model: Path) -> None:
    """More of them than are made at once, and a number that nothing divides."""
    config = TrainConfig(pretrained_model_name_or_path=str(base_model), resolution=64)
    models, initial = load_base_models(config, NoiseSchedule.from_pretrained(str(base_model)))
    conditions_RHWC = np.random.default_rng(0).integers(0, 256, (N + 1, 64, 64, 3), np.uint8)
    drawing = Drawing(unipc_plan(models.schedule, 2), 64, 64, config.seed, config.guidance_scale)
    drawn = []
    engines: list[Engine] = [PmapEngine(), MeshEngine.over(jax.devices(), 2)]
    for engine in engines:
        sampler = ImageSampler(engine, models, PromptInputs(tokenize), drawing, images_per_device=1)
        params, frozen = engine.place_state(initial.trained), engine.place_frozen(initial.frozen)
        drawn.append(sampler(params, frozen, ["a circle"] * (N + 1), conditions_RHWC))
    assert drawn[0].shape == (N + 1, 64, 64, 3)
    np.testing.assert_allclose(drawn[1].astype(int), drawn[0].astype(int), atol=1)


def tokenize(texts: list[str]) -> np.ndarray:
    """Any numbers, the same for the same text."""
    return np.stack([np.resize(np.frombuffer(text.encode() or b"0", np.uint8), 77) for text in texts]).astype(np.int32)


def test_pallas_kernels_run_on_the_rows_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA cannot divide them; what it gets is divided already."""
    from flax_trainer.models.kernels import attention as attention_kernels

    shapes: list[tuple[int, ...]] = []

    def kernel(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        shapes.append(query.shape)
        return attention_kernels.plain_attention(query, key, value)

    monkeypatch.setattr(attention_kernels, "flash_attention_tpu", kernel)
    engine = MeshEngine.over(jax.devices(), 2)
    query = np.random.default_rng(0).standard_normal((2 * N, 1024, 1, 8), np.float32)
    attend = engine.compile_for_rows(lambda params, frozen, x: dot_product_attention(x, x, x, "splash"))
    np.testing.assert_allclose(
        attend({}, {}, query), dot_product_attention(query, query, query, "plain"), rtol=1e-4, atol=1e-5
    )
    assert set(shapes) == {(2, 1024, 1, 8)}
    PmapEngine().compile_for_rows(lambda params, frozen, x: dot_product_attention(x, x, x, "splash"))({}, {}, query)
    assert set(shapes) == {(2, 1024, 1, 8)}
