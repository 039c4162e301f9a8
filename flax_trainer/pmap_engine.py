"""Replicated data parallelism: the whole state on every device, the batch split between them, `jax.pmap` around it.

Axes: N local devices, A accumulation slices, R local rows (N · B), B rows per device.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"
Tree = TypeVar("Tree")


def _local_sharding() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(AXIS))


def replicate(tree: Any) -> Any:
    """A copy of every array on every local device, as one array with a leading axis N."""
    sharding = _local_sharding()
    devices = jax.local_devices()

    def copies(array: Any) -> jax.Array:
        host = np.asarray(array)[None]
        buffers = [jax.device_put(host, device) for device in devices]
        return jax.make_array_from_single_device_arrays((len(devices), *host.shape[1:]), sharding, buffers)

    return jax.tree.map(copies, tree)


def fetch(tree: Tree) -> Tree:
    """The first local device's copy of replicated arrays, as numpy, without memory or work on any device."""
    return jax.tree.map(lambda array: np.asarray(array.addressable_shards[0].data)[0, ...], tree)


def shard_rows(array_R: np.ndarray) -> jax.Array:
    """Rows [R, ...] laid out for `jax.pmap`: [N, B, ...] on the devices. Returns before the copy ends."""
    sharding = _local_sharding()
    devices = sharding.mesh.size
    assert len(array_R) % devices == 0, (array_R.shape, devices)
    return jax.device_put(array_R.reshape(devices, -1, *array_R.shape[1:]), sharding)


def shard_batch(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's part of a step [A, R, ...] laid out for `jax.pmap`: [N, A, B, ...]. Returns before the copy ends."""
    sharding = _local_sharding()
    devices = sharding.mesh.size

    def split(array: np.ndarray) -> np.ndarray:
        slices, rows = array.shape[:2]
        assert rows % devices == 0, (array.shape, devices)
        return array.reshape(slices, devices, rows // devices, *array.shape[2:]).swapaxes(0, 1)

    return {name: jax.device_put(split(array), sharding) for name, array in batch.items()}
