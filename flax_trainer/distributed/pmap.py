"""Replicated data parallelism: the whole state on every device, the batch split between them, `jax.pmap` around it.

Several processes follow pmap's own convention: each passes and gets what its local devices hold, and collectives go
over the devices of all processes.

Axes: N local devices, A accumulation slices, R rows, B rows per device.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_trainer.models.params import Params, cast
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import TrainStep

AXIS = "batch"
Tree = TypeVar("Tree")


class PmapEngine:
    """See `engine.Engine`. Placed arrays have a leading axis N."""

    axis_name = AXIS

    def __init__(self) -> None:
        self._devices = jax.local_devices()
        self._sharding = NamedSharding(Mesh(np.array(self._devices), (AXIS,)), PartitionSpec(AXIS))

    @property
    def compiles_ahead(self) -> bool:
        """A compiled program wants arrays that span all processes, and only pmap itself makes them of local ones."""
        return jax.process_count() == 1

    def gather_params(self, params: Params, dtype: jax.typing.DTypeLike) -> Params:
        return cast(params, dtype)

    def place_state(self, tree: Tree) -> Tree:
        """A copy of every array on every local device."""

        def copies(array: Any) -> jax.Array:
            host = np.asarray(array)[None]
            buffers = [jax.device_put(host, device) for device in self._devices]
            return jax.make_array_from_single_device_arrays(
                (len(self._devices), *host.shape[1:]), self._sharding, buffers
            )

        return jax.tree.map(copies, tree)

    def place_frozen(self, tree: Tree) -> Tree:
        return self.place_state(tree)

    def place_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """[A, R, ...] of this process → [N, A, B, ...]."""
        devices = len(self._devices)

        def split(array: np.ndarray) -> np.ndarray:
            slices, rows = array.shape[:2]
            assert rows % devices == 0, (array.shape, devices)
            return array.reshape(slices, devices, rows // devices, *array.shape[2:]).swapaxes(0, 1)

        return {name: jax.device_put(split(array), self._sharding) for name, array in batch.items()}

    def compile_train_step(self, step: TrainStep) -> Any:
        return jax.pmap(step, axis_name=AXIS, in_axes=(0, 0, 0, None), donate_argnums=(0,))

    def compile_for_rows(self, function: Callable[..., jax.Array]) -> Callable[..., np.ndarray]:
        def on_a_device(params: Any, frozen: Any, rows: Any) -> jax.Array:
            return jax.lax.all_gather(function(params, frozen, rows), AXIS, tiled=True)

        compiled = jax.pmap(on_a_device, axis_name=AXIS)
        return lambda params, frozen, rows: self.fetch(
            compiled(params, frozen, jax.tree.map(self._place_share_of_rows, rows))
        )

    def fetch(self, tree: Tree) -> Tree:
        """The first local device's copy, without memory or work on any device."""
        return jax.tree.map(lambda array: np.asarray(array.addressable_shards[0].data)[0, ...], tree)

    def to_save(self, state: TrainState) -> TrainState:
        return self.fetch(state)

    def _place_share_of_rows(self, array_R: np.ndarray) -> jax.Array:
        """Of rows that all processes have, those of this one: [N, B, ...]."""
        assert len(array_R) % jax.device_count() == 0, (array_R.shape, jax.device_count())
        share = len(array_R) // jax.process_count()
        first = share * jax.process_index()
        mine = array_R[first : first + share]
        return jax.device_put(mine.reshape(len(self._devices), -1, *mine.shape[1:]), self._sharding)
