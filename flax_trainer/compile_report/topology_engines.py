"""The engines on devices that are not there: the same programs, from shapes instead of arrays.

Axes: N devices, A accumulation slices, H rows of a host, B rows of a device.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_trainer.distributed.engine import Engine
from flax_trainer.distributed.mesh import FSDP, SLICES_OF_ROWS, WHOLE, MeshEngine, spec_of
from flax_trainer.distributed.pmap import AXIS, PmapEngine
from flax_trainer.training.step import TrainStep
from shared.config import TrainConfig


class EngineOnTopology(Engine, Protocol):
    """An engine whose step can be lowered for `shapes`."""

    def shapes(self, state: Any, frozen: Any, batch: Mapping[str, np.ndarray]) -> tuple[Any, Any, Any]:
        """What the engine's `place_…` would make of these, as `jax.ShapeDtypeStruct`s; `batch` is a host's."""
        ...


def engine_on(config: TrainConfig, devices: Sequence[jax.Device]) -> EngineOnTopology:
    """The engine that `--parallelism` names.

    Raises:
        UserError: the devices cannot be divided as `--fsdp_devices` says.
    """
    if config.parallelism == "mesh":
        return MeshOnTopology(MeshEngine.over(devices, config.fsdp_devices).mesh)
    return PmapOnTopology(devices)


class PmapOnTopology(PmapEngine):
    """`jax.pmap` itself compiles for the devices of one host; this is what it does, on those of all hosts."""

    def __init__(self, devices: Sequence[jax.Device]):
        super().__init__()
        self._mesh = Mesh(np.array(devices), (AXIS,))

    def shapes(self, state: Any, frozen: Any, batch: Mapping[str, np.ndarray]) -> tuple[Any, Any, Any]:
        devices = list(self._mesh.devices.flat)
        count, on_host = len(devices), sum(device.process_index == devices[0].process_index for device in devices)
        of_a_device = {
            name: jax.ShapeDtypeStruct((array.shape[0], array.shape[1] // on_host, *array.shape[2:]), array.dtype)
            for name, array in batch.items()
        }
        sharding = NamedSharding(self._mesh, PartitionSpec(AXIS))
        return jax.tree.map(
            lambda array: jax.ShapeDtypeStruct((count, *np.shape(array)), array.dtype, sharding=sharding),
            (state, frozen, of_a_device),
        )

    def compile_train_step(self, step: TrainStep) -> Any:
        def of_a_device(state: Any, frozen: Any, batch: Any, learning_rate: Any) -> Any:
            state, frozen, batch = jax.tree.map(lambda array: array[0], (state, frozen, batch))
            return jax.tree.map(lambda array: array[None], step(state, frozen, batch, learning_rate))

        mapped, whole = PartitionSpec(AXIS), PartitionSpec()
        return jax.jit(
            jax.shard_map(
                of_a_device,
                mesh=self._mesh,
                in_specs=(mapped, mapped, mapped, whole),
                out_specs=mapped,
                check_vma=False,
            ),
            donate_argnums=(0,),
        )


class MeshOnTopology(MeshEngine):
    """`MeshEngine` compiles for whatever its mesh consists of."""

    def shapes(self, state: Any, frozen: Any, batch: Mapping[str, np.ndarray]) -> tuple[Any, Any, Any]:
        hosts, fsdp_devices = len({device.process_index for device in self.mesh.devices.flat}), self.mesh.shape[FSDP]

        def shape(sizes: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(self.mesh, spec))

        return (
            jax.tree.map(lambda x: shape(np.shape(x), x.dtype, spec_of(np.shape(x), fsdp_devices)), state),
            jax.tree.map(lambda x: shape(np.shape(x), x.dtype, WHOLE), frozen),
            {
                name: shape((x.shape[0], x.shape[1] * hosts, *x.shape[2:]), x.dtype, SLICES_OF_ROWS)
                for name, x in batch.items()
            },
        )
