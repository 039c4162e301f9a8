"""The engines on devices that need not be there, on eight that are: they take and do what the trainer's own do."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from flax_trainer.compile_report.topology_engines import engine_on
from flax_trainer.distributed.engine import Engine
from flax_trainer.distributed.mesh import MeshEngine
from flax_trainer.distributed.pmap import PmapEngine
from flax_trainer.training.optimizer import AdamWSettings
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import Objective, make_train_step
from shared.config import TrainConfig
from shared.diffusion.schedule import NoiseSchedule
from tests.flax_trainer.training.stand_in_models import NOTHING_FROZEN, STAND_INS, batch_of

CONFIGS = [
    TrainConfig(),
    TrainConfig(parallelism="mesh", fsdp_devices=1),
    TrainConfig(parallelism="mesh", fsdp_devices=4),
]


def engine_of(config: TrainConfig) -> Engine:
    """As `train_flax.py` makes it."""
    return PmapEngine() if config.parallelism == "pmap" else MeshEngine.over(jax.devices(), config.fsdp_devices)


@pytest.mark.parametrize("config", CONFIGS, ids=["pmap", "8x1", "2x4"])
def test_shapes_are_those_of_what_the_engine_places(config: TrainConfig) -> None:
    state = TrainState.create({"large": np.zeros((64, 128), np.float32), "small": np.zeros(3, np.float32)})
    frozen, batch, engine = {"weight": np.zeros((8, 64, 64), np.float32)}, batch_of(1, 16), engine_of(config)
    placed = (engine.place_state(state), engine.place_frozen(frozen), engine.place_batch(batch))
    shapes = engine_on(config, jax.devices()).shapes(state, frozen, batch)
    assert jax.tree.structure(shapes) == jax.tree.structure(placed)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)


@pytest.mark.parametrize("config", CONFIGS, ids=["pmap", "8x1", "2x4"])
def test_steps_are_the_engines_own(config: TrainConfig, base_model: Path) -> None:
    objective = Objective(NoiseSchedule.from_pretrained(str(base_model)), np.ones(1000, np.float32), 1, np.float32)
    optimizer = AdamWSettings(0.9, 0.999, 1e-8, 0.01, max_grad_norm=0.1)
    engine = engine_of(config)

    def after_two_steps(compiling: Engine) -> list[Any]:
        step = make_train_step(
            STAND_INS,
            objective,
            optimizer,
            gather_params=compiling.gather_params,
            axis_name=compiling.axis_name,
        )
        compiled = compiling.compile_train_step(step)
        state = engine.place_state(TrainState.create({"weight": np.float32([[[0.5]]])}))
        for _ in range(2):
            state, metrics = compiled(state, NOTHING_FROZEN, engine.place_batch(batch_of(1, 16)), np.float32(1e-2))
        return jax.tree.leaves(engine.fetch((state, metrics)))

    for ours, expected in zip(after_two_steps(engine_on(config, jax.devices())), after_two_steps(engine), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
