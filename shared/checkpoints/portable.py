"""The PyTorch backend's checkpoints, in files that either backend reads and that hold nothing but numbers.

checkpoint-N/
  controlnet/              config.json and weights, in diffusers' layout
  unet_decoder.safetensors with --sd_unlocked, the trained part of the UNet, under `unet.NAME`
  optimizer.safetensors    the optimizer's state: `exp_avg.NAME`, `exp_avg_sq.NAME`, … for every parameter NAME
  average.safetensors      with --use_ema, the moving average of every trained parameter, under its name
  training_state.json      the step, the loss scaler, and what the checkpoint belongs to
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
from msgspec import Meta
from safetensors import safe_open

from shared.checkpoints.arrays import Layout, check_layouts
from shared.checkpoints.policy import RESUME_FROM_ANOTHER, Record, check_step
from shared.eight_bit_moments import from_bitsandbytes
from shared.models.weight_files import DIFFUSERS
from shared.untrusted import check_plain_files, check_plain_tree, foreign_library, read_json, shown
from shared.user_errors import UserError

CONTROLNET_FOLDER = "controlnet"
DECODER_FILE = "unet_decoder.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "average.safetensors"
STATE_FILE = "training_state.json"
_WEIGHTS_FILE = f"{CONTROLNET_FOLDER}/{DIFFUSERS.safetensors}.safetensors"

FLAX_MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}
"""PyTorch's names of AdamW's moments, and those of the Flax backend."""

_MOMENTS_OF_8_BITS = frozenset(
    f"{kind}{number}" for kind in ("state", "qmap", "absmax", "max", "new_max") for number in (1, 2)
) | {"unorm_vec"}  # what bitsandbytes' optimizers may keep of a parameter

_DTYPES = {"F32": "float32", "U8": "uint8"}  # by safetensors' names; all others keep those, and are refused
_MOST_FILES = 1000  # of the six that there are
_LARGEST_STEP = 2**31 - 1  # as an int32, which it is in Flax


class SavedLossScaler(TypedDict, total=False):
    """Of `torch.amp.GradScaler.state_dict()`, what changes during a run; there is nothing of one that was off."""

    scale: Annotated[float, Meta(gt=0, le=3.4e38)]  # an infinite one would never become finite again
    _growth_tracker: Annotated[int, Meta(ge=0, le=2**31 - 1)]


class TrainingState(TypedDict):
    """What `training_state.json` says. The loss scaler is None where there was none."""

    step: Annotated[int, Meta(ge=0, le=_LARGEST_STEP)]
    loss_scaler: SavedLossScaler | None
    record: Record


def read_training_state(checkpoint: Path) -> TrainingState:
    """`step`, `record` and `loss_scaler` (None where there was none).

    Raises:
        UserError: the file is damaged, or says another step than the folder's name.
    """
    _check_files(checkpoint)
    path = checkpoint / STATE_FILE
    state: TrainingState = read_json(path, TrainingState, fix=RESUME_FROM_ANOTHER)
    if state["loss_scaler"] and state["loss_scaler"].keys() != SavedLossScaler.__annotations__.keys():
        raise UserError(f"{shown(path)} holds a part of a loss scaler. {RESUME_FROM_ANOTHER}")
    check_step(checkpoint, state["step"])
    return state


def check_arrays(checkpoint: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what the files say they hold with what a run of these parameters needs, before anything of it is read.

    Raises:
        UserError: they are damaged, or hold arrays of other names, shapes or types.
    """
    _check_files(checkpoint)
    saved = {f"params/{name}": layout for path in _param_files(checkpoint) for name, layout in _layouts(path).items()}
    expected = _whole("params", shapes)
    if not is_saved_with_8_bits(checkpoint):
        moments = _layouts(checkpoint / OPTIMIZER_FILE)
        saved |= {"/".join(_kind_and_parameter(name)): layout for name, layout in moments.items()}
        expected |= _whole("exp_avg", shapes) | _whole("exp_avg_sq", shapes)
    averages = _average_layouts(checkpoint)
    if averages:
        saved |= {f"average/{name}": layout for name, layout in averages.items()}
        expected |= _whole("average", shapes)
    check_layouts(checkpoint, saved, expected)


def is_saved_with_8_bits(checkpoint: Path) -> bool:
    """Whether the optimizer's state is that of `--use_8bit_adam`.

    Raises:
        UserError: the file is damaged.
    """
    kinds = {_kind_and_parameter(name)[0] for name in _layouts(checkpoint / OPTIMIZER_FILE)}
    return is_of_8_bits(kinds)


def is_of_8_bits(kinds: Iterable[str]) -> bool:
    """The same of the kinds of array that are kept of a parameter."""
    return not _MOMENTS_OF_8_BITS.isdisjoint(kinds)


def shapes_of_params(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """As the files themselves say.

    Raises:
        UserError: the weights are damaged or not there.
    """
    _check_files(checkpoint)
    return {name: layout.shape for path in _param_files(checkpoint) for name, layout in _layouts(path).items()}


def read_params(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, value) of every trained parameter.

    Raises:
        UserError: the weights are damaged or not there.
    """
    for path in _param_files(checkpoint):
        yield from _read_arrays(path)


def read_optimizer_state(checkpoint: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """(kind, parameter, value) of every array of the optimizer's state; kind is `exp_avg` and the like.

    Raises:
        UserError: the file is damaged.
    """
    for name, value in _read_arrays(checkpoint / OPTIMIZER_FILE):
        yield *_kind_and_parameter(name), value


def read_8_bit_moments(checkpoint: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """(`exp_avg` or `exp_avg_sq`, parameter, float32 moment) of a checkpoint that `is_saved_with_8_bits`.

    Raises:
        UserError: the file is damaged.
    """
    states: dict[str, dict[str, np.ndarray]] = {}
    for kind, name, value in read_optimizer_state(checkpoint):
        states.setdefault(name, {})[kind] = value
    for name, shape in shapes_of_params(checkpoint).items():
        for number, kind in ((1, "exp_avg"), (2, "exp_avg_sq")):
            try:
                yield kind, name, from_bitsandbytes(states.get(name, {}), number, shape)
            except ValueError as error:
                path = checkpoint / OPTIMIZER_FILE
                raise UserError(
                    f"{shown(path)} does not hold the state of 8-bit AdamW for {shown(name)} ({error}). "
                    f"{RESUME_FROM_ANOTHER}"
                ) from error


def read_average(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, value) of the moving average of every parameter; nothing where the run keeps none.

    Raises:
        UserError: the file is damaged.
    """
    if os.path.lexists(checkpoint / AVERAGE_FILE):
        yield from _read_arrays(checkpoint / AVERAGE_FILE)


def _check_files(checkpoint: Path) -> None:
    check_plain_tree(checkpoint, _MOST_FILES)


def _param_files(checkpoint: Path) -> list[Path]:
    """Those of the decoder only where it was trained."""
    decoder = checkpoint / DECODER_FILE
    return [checkpoint / _WEIGHTS_FILE, *([decoder] if os.path.lexists(decoder) else [])]


def _average_layouts(checkpoint: Path) -> dict[str, Layout]:
    path = checkpoint / AVERAGE_FILE
    return _layouts(path) if os.path.lexists(path) else {}


def _whole(tree: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layout]:
    return {f"{tree}/{name}": Layout("float32", tuple(shape)) for name, shape in shapes.items()}


def _kind_and_parameter(name: str) -> tuple[str, str]:
    kind, _, parameter = name.partition(".")
    return kind, parameter


def _layouts(path: Path) -> dict[str, Layout]:
    """From the header alone, which says no more than the file can hold."""
    check_plain_files([path])
    with foreign_library(f"{shown(path)} cannot be read", RESUME_FROM_ANOTHER), safe_open(path, "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        return {
            name: Layout(_DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
            for name, part in slices.items()
        }


def _read_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    for name, layout in _layouts(path).items():
        if layout.dtype not in _DTYPES.values():
            raise UserError(
                f"{shown(path)} holds {shown(name)} as {shown(layout.dtype)}: expected float32. {RESUME_FROM_ANOTHER}"
            )
    with foreign_library(f"{shown(path)} cannot be read", RESUME_FROM_ANOTHER), safe_open(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            yield name, file.get_tensor(name)
