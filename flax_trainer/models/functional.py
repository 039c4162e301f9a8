"""NNX modules used as pure functions of a flat parameter dict.

The dict's keys are PyTorch's state-dict names (`down_blocks.0.resnets.1.conv1.weight`). Its values live outside the
module, so one dict can be donated, replicated, sharded, cast or saved without anything knowing about modules.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
from flax import nnx

Params = dict[str, jax.Array]
Path = tuple[Any, ...]
M = TypeVar("M", bound=nnx.Module)


@dataclass(frozen=True)
class ModelDef(Generic[M]):
    """Everything of a module but its values. Hashable by identity of its structure, so it may be closed over in jit."""

    graphdef: nnx.GraphDef[M]
    paths: tuple[tuple[Path, str, str], ...]  # (path in the module, PyTorch name, layout)

    @property
    def layouts(self) -> dict[str, str]:
        """PyTorch name → layout (see `adapter.py`)."""
        return {name: layout for _, name, layout in self.paths}

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
