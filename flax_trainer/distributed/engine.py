"""How a run uses its devices: one interface, behind it `jax.pmap` or `jax.jit` over a mesh.

The step, the evaluation and the sampler are pure functions that know of no device; an engine places their arguments
and compiles them. All of them take trees of any names and depths.

Axes: A accumulation slices, R rows over all devices, H rows of this process.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from flax_trainer.base_models import BaseModels, FrozenParams
from flax_trainer.distributed.mesh import MeshEngine
from flax_trainer.distributed.pmap import PmapEngine
from flax_trainer.models.params import Params
from flax_trainer.training.optimizer import AdamWSettings
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import Objective, TrainStep, make_train_step
from shared.config import TrainConfig
from shared.user_errors import UserError

Tree = TypeVar("Tree")
RowsFunction = Callable[[Params, FrozenParams, Any], jax.Array]
"""(ControlNet, frozen models, tree of arrays [B, ...]) → array [B, ...], every row by itself."""
RowsOnHost = Callable[[Params, FrozenParams, Any], np.ndarray]
"""The same from numpy arrays [R, ...], equal in all processes, to numpy [R, ...]; R is a multiple of the devices."""


class Engine(Protocol):
    """What both engines do. With several processes, all of them make the same calls in the same order."""

    @property
    def axis_name(self) -> str | None:
        """The mapped axis that a step has to average over; None where a step sees the whole batch."""
        ...

    @property
    def compiles_ahead(self) -> bool:
        """Whether the step, once `lower(…).compile()` has compiled it, takes arrays as they are placed."""
        ...

    def gather_params(self, params: Params, dtype: jax.typing.DTypeLike) -> Params:
        """For use inside compiled functions: trained parameters, as this engine places them, whole and in this dtype.

        Of their gradients, each device gets what it keeps.
        """
        ...

    def place_state(self, tree: Any) -> Any:
        """Put what is trained (numpy, the same in all processes) onto the devices. It may be donated."""
        ...

    def place_frozen(self, tree: Any) -> Any:
        """Put what is only used (numpy, the same in all processes) onto the devices, whole on each."""
        ...

    def place_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Split this process's part [A, H, ...] of a step's batch between its devices. Returns before copies end."""
        ...

    def compile_train_step(self, step: TrainStep) -> jax.stages.Wrapped:
        """The step on placed arguments, whose state is donated; the learning rate is a float32 scalar.

        Its metrics are for `fetch`.
        """
        ...

    def compile_for_rows(self, function: RowsFunction) -> RowsOnHost:
        """Losses or images of rows that all devices share. The parameters are placed, the rows are not."""
        ...

    def fetch(self, tree: Tree) -> Tree:
        """Placed arrays as whole numpy arrays, in every process."""
        ...

    def to_save(self, state: TrainState) -> TrainState:
        """The state as `Checkpoints.save` takes it, safe from the steps that follow."""
        ...


def make_engine(config: TrainConfig) -> Engine:
    """The engine that `--parallelism` names, on all devices of all processes.

    Raises:
        UserError: the devices cannot be divided as `--fsdp_devices` says.
    """
    if config.parallelism == "mesh":
        return MeshEngine.over(jax.devices(), config.fsdp_devices)
    return PmapEngine()


def check_engine_fits(config: TrainConfig, engine: Engine) -> None:
    """Raises UserError where a run would stop in the middle to compile a step for pictures of another shape."""
    if config.aspect_buckets is not None and not engine.compiles_ahead:
        raise UserError(
            "--aspect_buckets compiles a step for each shape before the first one is taken, which --parallelism pmap "
            "cannot do in several processes. Add --parallelism mesh."
        )


def compile_train_step(config: TrainConfig, models: BaseModels, engine: Engine) -> jax.stages.Wrapped:
    """The training step that a configuration asks for: what `train_flax.py` runs and `compile_report` compiles.

    It compiles when it is first called or lowered.
    """
    step = make_train_step(
        models.defs,
        Objective.create(config, models),
        AdamWSettings.from_config(config),
        gather_params=engine.gather_params,
        axis_name=engine.axis_name,
    )
    return engine.compile_train_step(step)


def peak_device_memory_gib() -> float | None:
    """Of the fullest local device; None where devices keep no count."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    counted = [peak for peak in peaks if peak is not None]
    return max(counted) / 2**30 if counted else None
