"""The trained parameters in a checkpoint of either backend, without the optimizer's state."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from shared.checkpoints.arrays import Layout, check_layouts
from shared.checkpoints.digests import examine
from shared.checkpoints.orbax_files import is_orbax_checkpoint, open_arrays, torch_layout, torch_shape
from shared.checkpoints.portable import read_average, read_params, shapes_of_params
from shared.untrusted import shown
from shared.user_errors import UserError


def read_trained_params(checkpoint: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """In PyTorch's names and layouts: their moving average where the run keeps one, as its validation takes them.

    `shapes` are those expected, in PyTorch, which are compared before an array is read.

    Raises:
        UserError: the checkpoint is damaged, or holds arrays of other names, shapes or types.
    """
    verdict = examine(checkpoint)
    if verdict.damage:
        raise UserError(f"{shown(checkpoint)} is {verdict}. Give another checkpoint, or the finished run.")
    expected = {f"params/{name}": Layout("float32", tuple(shape)) for name, shape in shapes.items()}
    return (_of_flax if is_orbax_checkpoint(checkpoint) else _of_torch)(checkpoint, expected)


def _of_flax(checkpoint: Path, expected: Mapping[str, Layout]) -> dict[str, np.ndarray]:
    stored = open_arrays(checkpoint)
    tree = "ema/" if any(name.startswith("ema/") for name in stored.stores) else "params/"
    chosen = {name: store for name, store in stored.stores.items() if name.startswith(tree)}
    part = dataclasses.replace(stored, stores=chosen)
    layouts = {
        f"params/{name.removeprefix(tree)}": layout._replace(shape=torch_shape(layout.shape))
        for name, layout in part.layouts.items()
    }
    check_layouts(checkpoint, layouts, expected)
    return {name.removeprefix(tree): torch_layout(array) for name, array in part.read().items()}


def _of_torch(checkpoint: Path, expected: Mapping[str, Layout]) -> dict[str, np.ndarray]:
    shapes = shapes_of_params(checkpoint)
    check_layouts(checkpoint, {f"params/{name}": Layout("float32", shape) for name, shape in shapes.items()}, expected)
    params = dict(read_params(checkpoint))
    averages = {name: value for name, value in read_average(checkpoint) if name in params}
    strange = [name for name, value in averages.items() if value.shape != params[name].shape]
    if strange:
        raise UserError(
            f"{shown(checkpoint)} holds an average of another shape than {shown(strange[0])}: it is damaged. Give "
            "another checkpoint, or the finished run."
        )
    return params | averages
