"""Data parallelism with a divided state: `jax.jit` over a mesh of devices, data × fsdp.

Every device computes its own rows of the batch. The `fsdp` devices of a group share one copy of what is trained, the
groups along `data` hold a copy each (ZeRO, Rajbhandari et al. 2020, stage 3; PyTorch calls it fully sharded data
parallelism). A step gathers the ControlNet in the compute dtype and scatters its gradients, so parameters, moments and
gradients rest divided. The frozen models are whole on every device: a step needs them whole from its forward pass to
the end of its backward pass, so dividing them in between would cost a gathering per step and leave the peak as it is.

Axes: A accumulation slices, R rows over all devices, H rows of this process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from flax_trainer.models.params import Params
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import TrainStep
from shared.user_errors import UserError

DATA, FSDP = "data", "fsdp"
ROWS = PartitionSpec((DATA, FSDP))
SLICES_OF_ROWS = PartitionSpec(None, (DATA, FSDP))
WHOLE = PartitionSpec()

SMALLEST_DIVIDED = 4096  # elements; biases and norms are smaller, and not worth a message each

Tree = TypeVar("Tree")


def spec_of(shape: tuple[int, ...], fsdp_devices: int) -> PartitionSpec:
    """Which axis of a trained array is divided over `fsdp`: the largest one that can be; none of a small array."""
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp_devices == 0]
    if not divisible or int(np.prod(shape)) < SMALLEST_DIVIDED:
        return WHOLE
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(FSDP if axis == largest else None for axis in range(largest + 1)))


@dataclass(frozen=True)
class MeshEngine:
    """See `engine.Engine`. Placed arrays keep their shapes and span the devices of all processes."""

    mesh: Mesh
    axis_name: None = None
    compiles_ahead: bool = True

    @classmethod
    def over(cls, devices: Sequence[jax.Device], fsdp_devices: int) -> "MeshEngine":
        """With `fsdp_devices` neighbours in each group.

        Devices are put in the order of their processes, so that process p has the rows p·H to (p+1)·H, as the loader
        hands them out; `jax.make_mesh` promises no order.

        Raises:
            UserError: the devices cannot be divided into such groups.
        """
        count = len(devices)
        if count % fsdp_devices:
            divisors = ", ".join(str(number) for number in range(1, count + 1) if count % number == 0)
            raise UserError(
                f"--fsdp_devices is {fsdp_devices}, but the run has {count} devices, which groups of that size do not "
                f"divide. Give one of {divisors}."
            )
        in_order = sorted(devices, key=lambda device: (device.process_index, device.id))
        grid = np.array(in_order).reshape(count // fsdp_devices, fsdp_devices)
        return cls(Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto)))

    def gather_params(self, params: Params, dtype: jax.typing.DTypeLike) -> Params:
        """Cast, then whole on every device; of the gradients, each device keeps its share.

        XLA adds gradients up over the devices where they arise, so in the dtype of the computation.
        """

        def whole(array: jax.Array) -> jax.Array:
            return self._constrained(array.astype(dtype), WHOLE)

        def divided(gradient: jax.Array) -> jax.Array:
            return self._constrained(gradient.astype(jnp.float32), self._spec(gradient))

        gather = jax.custom_vjp(whole)
        gather.defvjp(lambda array: (whole(array), None), lambda _, gradient: (divided(gradient),))
        return {name: gather(array) for name, array in params.items()}

    def place_state(self, tree: Tree) -> Tree:
        return jax.tree.map(lambda array: self._place(np.asarray(array), self._spec(array)), tree)

    def place_frozen(self, tree: Tree) -> Tree:
        return jax.tree.map(lambda array: self._place(np.asarray(array), WHOLE), tree)

    def place_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """[A, H, ...] of every process → [A, R, ...] over all of them."""
        sharding, processes = self._sharding(SLICES_OF_ROWS), jax.process_count()

        def place(array: np.ndarray) -> jax.Array:
            slices, rows, *rest = array.shape
            return jax.make_array_from_process_local_data(sharding, array, (slices, rows * processes, *rest))

        return {name: place(array) for name, array in batch.items()}

    def compile_train_step(self, step: TrainStep) -> Any:
        def train_step(state: TrainState, frozen: Any, batch: Any, learning_rate: Any) -> tuple[TrainState, Any]:
            with use_abstract_mesh(self.mesh.abstract_mesh):
                state, metrics = step(state, frozen, batch, learning_rate)
            return jax.tree.map(lambda array: self._constrained(array, self._spec(array)), state), jax.tree.map(
                lambda array: self._constrained(array, WHOLE), metrics
            )

        return jax.jit(train_step, donate_argnums=(0,))

    def compile_for_rows(self, function: Callable[..., jax.Array]) -> Callable[..., np.ndarray]:
        def on_all_devices(params: Any, frozen: Any, rows: Any) -> jax.Array:
            with use_abstract_mesh(self.mesh.abstract_mesh):
                return function(params, frozen, rows)

        compiled = jax.jit(on_all_devices, out_shardings=self._sharding(WHOLE))
        return lambda params, frozen, rows: self.fetch(
            compiled(params, frozen, jax.tree.map(partial(self._place, spec=ROWS), rows))
        )

    def fetch(self, tree: Tree) -> Tree:
        """One array after the other, so that no device holds more than one whole one beside its share."""
        return jax.tree.map(self._fetch, tree)

    def to_save(self, state: TrainState) -> TrainState:
        """As it lies: every process saves what its devices hold."""
        return state

    def _fetch(self, array: jax.Array) -> np.ndarray:
        if not (array.is_fully_addressable or array.is_fully_replicated):
            array = jax.device_put(array, self._sharding(WHOLE))
        return np.asarray(array)

    def _place(self, array: np.ndarray, spec: PartitionSpec) -> jax.Array:
        """An array that all processes have."""
        return jax.make_array_from_callback(array.shape, self._sharding(spec), lambda index: array[index])

    def _constrained(self, array: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, self._sharding(spec))

    def _spec(self, array: Any) -> PartitionSpec:
        return spec_of(np.shape(array), self.mesh.shape[FSDP])

    def _sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)
