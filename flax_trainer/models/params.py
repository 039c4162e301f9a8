"""Parameters as a flat dict: NNX modules used as pure functions of it, and the layouts of its arrays.

The dict's keys are PyTorch's state-dict names (`down_blocks.0.resnets.1.conv1.weight`). Its values live outside the
module, so one dict can be donated, replicated, sharded, cast or saved without anything knowing about modules.
Every `nnx.Param` names its layout; loading and saving ask here, and nowhere else, what that means.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from flax import nnx

Params = dict[str, jax.Array]
HostParams = dict[str, np.ndarray]
Path = tuple[Any, ...]
M = TypeVar("M", bound=nnx.Module)

CONV = "conv"  # WHIO here, OIHW in PyTorch
LINEAR = "linear"  # IO here, OI in PyTorch
PLAIN = "plain"  # the same in both


@dataclass(frozen=True)
class ModelDef(Generic[M]):
    """Everything of a module but its values. Hashable by identity of its structure, so it may be closed over in jit."""

    graphdef: nnx.GraphDef[M]
    paths: tuple[tuple[Path, str, str], ...]  # (path in the module, PyTorch name, layout)

    @property
    def layouts(self) -> dict[str, str]:
        """PyTorch name → layout."""
        return {name: layout for _, name, layout in self.paths}

    @property
    def without_values(self) -> M:
        """The module with nothing in its parameters, to read its configuration from."""
        return nnx.merge(self.graphdef, nnx.from_flat_state([(path, None) for path, _, _ in self.paths]))

    def bind(self, params: Params) -> M:
        """The callable module with these values."""
        return nnx.merge(self.graphdef, nnx.from_flat_state([(path, params[name]) for path, name, _ in self.paths]))


def split(model: M) -> tuple[ModelDef[M], Params]:
    """Take a module apart into its definition and its flat parameters. `ModelDef.bind` is the inverse.

    Inside `nnx.eval_shape` or on its result the values are `jax.ShapeDtypeStruct`s.
    """
    graphdef, state = nnx.split(model)
    paths: list[tuple[Path, str, str]] = []
    params: Params = {}
    for path, param in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        paths.append((path, name, param.layout))
        params[name] = param.get_value()
    return ModelDef(graphdef, tuple(paths)), params


def cast(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """The same parameters in another dtype."""
    return {name: value.astype(dtype) for name, value in params.items()}


def from_torch_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """A view of a PyTorch-layout array in this project's layout: where it differs, all axes are in reverse order."""
    return array if layout == PLAIN else array.T


def to_torch_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """A view of one of our arrays in PyTorch's layout; the inverse of `from_torch_layout`."""
    return from_torch_layout(array, layout)


def torch_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape that an array of ours has in PyTorch."""
    return shape if layout == PLAIN else shape[::-1]
