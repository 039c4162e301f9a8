"""Reading the Flax backend's Orbax checkpoints, in PyTorch's names and layouts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.checkpoints.arrays import Layout, check_layouts
from shared.checkpoints.orbax_files import is_orbax_checkpoint, open_arrays, read_record, torch_layout, torch_shape
from shared.checkpoints.policy import check_step
from shared.checkpoints.portable import FLAX_MOMENTS
from shared.eight_bit_moments import blocks_of, dequantised, to_bitsandbytes

_MOMENTS = {flax: torch for torch, flax in FLAX_MOMENTS.items()}
_OF_8_BITS = {"mu": 1, "nu": 2}  # what bitsandbytes calls them: state1, state2
_LOSS_SCALER = {"scale": "scale", "growth_tracker": "_growth_tracker"}
_ALONE = {"step": Layout("int32", ())}
_OF_LOSS_SCALER = {"loss_scaler/scale": Layout("float32", ()), "loss_scaler/growth_tracker": Layout("int32", ())}


def is_flax_checkpoint(checkpoint: Path) -> bool:
    """Whether Orbax wrote this checkpoint."""
    return is_orbax_checkpoint(checkpoint)


def read_flax_record(checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint says about the run it belongs to.

    Raises:
        UserError: it is damaged.
    """
    return {**read_record(checkpoint)}


class FlaxCheckpoint(NamedTuple):
    """What is in one, in PyTorch's layouts. `optimizer` is by parameter and torch's name of its state.

    Moments in eight bits are rounded anew, for the backends cut them into blocks of different numbers.

    `loss_scaler` has what of a `torch.amp.GradScaler`'s state changes; it is empty for a run that scaled no loss, as is
    `average`, the moving average of the parameters, for one that keeps none.
    """

    step: int
    params: dict[str, np.ndarray]
    optimizer: dict[str, dict[str, np.ndarray]]
    loss_scaler: dict[str, float]
    average: dict[str, np.ndarray]


def read_flax_checkpoint(checkpoint: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> FlaxCheckpoint:
    """Read everything that training goes on from.

    `shapes` are those of the trained parameters in PyTorch, which are compared before any array is read; without them,
    the rest of the checkpoint has to fit its own parameters.

    Raises:
        UserError: it is damaged, or holds arrays of other names, shapes or types.
    """
    stored = open_arrays(checkpoint)
    layouts = {name: layout._replace(shape=torch_shape(layout.shape)) for name, layout in stored.layouts.items()}
    check_layouts(checkpoint, layouts, _expected(layouts, shapes))
    params: dict[str, np.ndarray] = {}
    state: dict[str, dict[str, np.ndarray]] = {}
    loss_scaler: dict[str, float] = {}
    average: dict[str, np.ndarray] = {}
    arrays = stored.read()
    check_step(checkpoint, int(arrays["step"]))
    in_eight_bits = any(path.startswith("mu_scales/") for path in arrays)
    for path, array in arrays.items():
        tree, _, name = path.partition("/")
        if tree == "params":
            params[name] = torch_layout(array)
        elif tree == "ema":
            average[name] = torch_layout(array)
        elif tree in _MOMENTS and in_eight_bits:
            scales = arrays.get(f"{tree}_scales/{name}")
            moment = array if scales is None else dequantised(array, scales, signed=tree == "mu")
            state.setdefault(name, {}).update(to_bitsandbytes(torch_layout(moment), _OF_8_BITS[tree]))
        elif tree in _MOMENTS:
            state.setdefault(name, {})[_MOMENTS[tree]] = torch_layout(array)
        elif tree == "loss_scaler":
            loss_scaler[_LOSS_SCALER[name]] = array.item()
    return FlaxCheckpoint(int(arrays["step"]), params, state, loss_scaler, average)


def _expected(saved: Mapping[str, Layout], shapes: Mapping[str, tuple[int, ...]] | None) -> dict[str, Layout]:
    """Whole moments; a loss scaler and averages where there is anything of them."""
    if shapes is None:
        params = {name: layout.shape for name, layout in saved.items() if name.startswith("params/")}
        shapes = {name.removeprefix("params/"): shape for name, shape in params.items()}
    parts = {path.partition("/")[0] for path in saved}
    trees = ("params", *_MOMENTS, *(["ema"] if "ema" in parts else []))
    of_params = {f"{tree}/{name}": Layout("float32", shape) for tree in trees for name, shape in shapes.items()}
    if "mu_scales" in parts:
        of_params |= _moments_of_8_bits(shapes)
    return of_params | _ALONE | (_OF_LOSS_SCALER if "loss_scaler" in parts else {})


def _moments_of_8_bits(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layout]:
    """Those that are stored so; shapes as `torch_shape` leaves them."""
    layouts: dict[str, Layout] = {}
    for name, shape in shapes.items():
        in_flax = torch_shape(shape)  # which is its own inverse
        blocks = blocks_of(in_flax)
        if blocks is not None:
            scales = torch_shape(blocks.scales(in_flax))
            for tree in _OF_8_BITS:
                layouts |= {
                    f"{tree}/{name}": Layout("uint8", shape),
                    f"{tree}_scales/{name}": Layout("float32", scales),
                }
    return layouts
