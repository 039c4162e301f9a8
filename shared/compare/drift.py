"""How far two ControlNets lie apart, tensor by tensor; never more than one tensor of each is in memory.

Where a UNet's decoder was trained with them, it counts as part of them.
"""

import math
import os
import struct
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from shared.checkpoints.policy import CHECKPOINT_PREFIX, checkpoint_step, checkpoints_in
from shared.checkpoints.portable import CONTROLNET_FOLDER
from shared.compare.report import MOST_STEPS
from shared.compare.run import check_inside
from shared.models.trained_parts import UNET_FOLDER, UNET_PREFIX, is_decoder, with_unet_prefix
from shared.models.weight_files import DIFFUSERS, candidates, is_index, shard_names
from shared.untrusted import MIB, foreign_library, open_file, shown
from shared.user_errors import UserError

_NAMES_SHOWN = 3
_LONGEST_NAME = 200  # characters, where a name is shown

_KINDS = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
"""What numpy reads by itself; trained parameters are F32."""

_MOST_NUMBERS = 2**26
"""In a tensor, of which five copies of 8 bytes each are in memory; the largest of SDXL's UNet has 30 million."""

_MOST_NUMBERS_OF_ALL = 2**32
"""SDXL's ControlNet and its UNet's decoder together have less than 3 thousand million."""

_MOST_TENSORS = 20_000  # SDXL's UNet has 1,700
_MOST_DIMENSIONS = 8
_LARGEST_HEADER = 16 * MIB  # of SDXL's UNet, with 1,700 tensors, some 200 kB
_MOST_CHECKPOINTS = 1000  # that both runs have


@dataclass(frozen=True)
class Distance:
    """Sums of squares over some parameters: of the differences and of either side's values."""

    difference: float = 0.0
    a: float = 0.0
    b: float = 0.0

    @property
    def relative(self) -> float:
        """‖a - b‖ / max(‖a‖, ‖b‖), L2 norms: 0 where both are 0, infinite where something is not finite."""
        if not math.isfinite(self.difference):
            return math.inf
        if self.difference == 0:
            return 0.0
        largest = max(self.a, self.b)  # 0 where the squares were too small for a float64
        return math.sqrt(self.difference / largest) if largest > 0 else math.inf

    def __add__(self, other: "Distance") -> "Distance":
        return Distance(self.difference + other.difference, self.a + other.a, self.b + other.b)


@dataclass(frozen=True)
class TensorDistance:
    """A parameter by its name in diffusers."""

    name: str
    size: int
    distance: Distance


@dataclass(frozen=True)
class BlockDistance:
    """The parameters of a block: how many, and the distance over all of them."""

    name: str
    size: int
    distance: Distance


@dataclass(frozen=True)
class Drift:
    """The distance of two ControlNets, tensor by tensor in the order of their names."""

    tensors: Sequence[TensorDistance]

    @property
    def relative(self) -> float:
        """The relative L2 difference of all parameters together."""
        return sum((tensor.distance for tensor in self.tensors), Distance()).relative

    @property
    def size(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    def blocks(self) -> list[BlockDistance]:
        """The same by block, in the order in which the network computes."""
        groups: dict[str, list[TensorDistance]] = {}
        for tensor in self.tensors:
            groups.setdefault(block_of(tensor.name), []).append(tensor)
        return [
            BlockDistance(
                name,
                sum(tensor.size for tensor in groups[name]),
                sum((tensor.distance for tensor in groups[name]), Distance()),
            )
            for name in sorted(groups, key=_computing_order)
        ]

    def worst(self, count: int) -> list[TensorDistance]:
        """The tensors with the largest relative difference, the worst first; equal ones are left out."""
        apart = [tensor for tensor in self.tensors if tensor.distance.relative > 0]
        return sorted(apart, key=lambda tensor: -tensor.distance.relative)[:count]


def block_of(name: str) -> str:
    """`down_blocks.1` for what is in it, else the first part of the name: `mid_block`, `controlnet_down_blocks`.

    Of the UNet's decoder likewise `unet.up_blocks.1` and `unet.conv_out`.
    """
    prefix = UNET_PREFIX if name.startswith(UNET_PREFIX) else ""
    parts = name.removeprefix(prefix).split(".")
    return prefix + (".".join(parts[:2]) if parts[0] in ("down_blocks", "up_blocks") else parts[0])


def measure_drift(folder_a: Path, folder_b: Path) -> Drift:
    """The distance of the models in two folders of diffusers' layout, each with its trained decoder if it has one.

    Raises:
        UserError: there is no safetensors file, it is damaged, or the models have other parameters.
    """
    return _drift(_Place(folder_a, folder_a), _Place(folder_b, folder_b))


def measure_checkpoint_drift(run_a: Path, run_b: Path, step: int) -> float:
    """The relative L2 difference at a checkpoint of two run folders, of the ControlNets alone; raises the same."""
    folder_a, folder_b = checkpoint_folders(run_a, run_b, step)
    return _drift(_Place(run_a, folder_a), _Place(run_b, folder_b)).relative


@dataclass(frozen=True)
class _Place:
    """A folder with weights inside of a run's folder, or that folder itself; nothing is read from outside of it."""

    run: Path
    folder: Path


def _drift(place_a: _Place, place_b: _Place) -> Drift:
    with _Weights(place_a) as a, _Weights(place_b) as b:
        _check_same_parameters(a, b)
        return Drift([TensorDistance(name, *_measure(a.read(name), b.read(name))) for name in a.names])


def common_checkpoints(folder_a: Path, folder_b: Path) -> tuple[list[int], list[int]]:
    """Steps of the checkpoints in both run folders whose ControlNet can be read in both, and of those where not.

    Raises:
        UserError: more in common than any run has, or a folder cannot be read.
    """
    common = sorted(_steps_of(folder_a) & _steps_of(folder_b))
    if len(common) > _MOST_CHECKPOINTS:
        raise UserError(
            f"{shown(folder_a)} and {shown(folder_b)} have {len(common)} checkpoints in common, expected at most "
            f"{_MOST_CHECKPOINTS}. Move some of them elsewhere."
        )
    readable = [step for step in common if all(map(_has_weights, checkpoint_folders(folder_a, folder_b, step)))]
    return readable, [step for step in common if step not in readable]


def checkpoint_folders(folder_a: Path, folder_b: Path, step: int) -> tuple[Path, Path]:
    """Where the ControlNets of a common checkpoint are."""
    name = f"{CHECKPOINT_PREFIX}{step}"
    return folder_a / name / CONTROLNET_FOLDER, folder_b / name / CONTROLNET_FOLDER


class _Weights:
    """What was trained, from the safetensors of a folder, whole or in shards, read tensor by tensor."""

    def __init__(self, place: _Place):
        self.folder = place.folder
        self._closing = ExitStack()
        self._found = self._open(place)
        if os.path.isdir(place.folder / UNET_FOLDER):  # of a run with --sd_unlocked
            unet = self._open(_Place(place.run, place.folder / UNET_FOLDER))
            self._found |= with_unet_prefix({name: found for name, found in unet.items() if is_decoder(name)})
        self._check_sizes()

    def _open(self, place: _Place) -> dict[str, tuple[Any, str]]:
        """By name: the file, and the name in it."""
        files = _files(place)
        for path in files:
            _check_header(path, self.folder)
        with _whole(self.folder):
            opened = [self._closing.enter_context(safe_open(path, framework="np")) for path in files]
            return {name: (file, name) for file in opened for name in file.keys()}  # noqa: SIM118 (not a dict)

    def _check_sizes(self) -> None:
        if not self._found:
            raise UserError(f"The ControlNet in {shown(self.folder)} has no parameters. {_COPY_AGAIN}")
        if len(self._found) > _MOST_TENSORS:
            raise UserError(f"The ControlNet in {shown(self.folder)} has {len(self._found)} parameters, too many.")
        total = 0
        for name in self.names:
            shape, kind = self.shape(name), self._kind(name)
            numbers = math.prod(shape)
            total += numbers
            if kind not in _KINDS:
                raise UserError(f"{self._what(name)} is of the kind {shown(kind)}; a run's parameters are F32.")
            # a dimension of 0 does not make the others smaller
            if len(shape) > _MOST_DIMENSIONS or max(numbers, *shape, 0) > _MOST_NUMBERS or total > _MOST_NUMBERS_OF_ALL:
                raise UserError(f"{self._what(name)} is larger than any ControlNet's: its shape is {shown(shape)}.")

    def _what(self, name: str) -> str:
        return f"The parameter {shown(name, _LONGEST_NAME)} of the ControlNet in {shown(self.folder)}"

    def _kind(self, name: str) -> str:
        file, name_there = self._found[name]
        return str(file.get_slice(name_there).get_dtype())

    @property
    def names(self) -> list[str]:
        return sorted(self._found)

    def shape(self, name: str) -> list[int]:
        file, name_there = self._found[name]
        return list(file.get_slice(name_there).get_shape())

    def read(self, name: str) -> npt.NDArray[np.float64]:
        file, name_there = self._found[name]
        with _whole(self.folder):
            return np.asarray(file.get_tensor(name_there), np.float64)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()


_COPY_AGAIN = "Copy the folder again, or run the training again."


def _whole(folder: Path) -> AbstractContextManager[None]:
    return foreign_library(f"The ControlNet in {shown(folder)} is not whole", _COPY_AGAIN)


def _files(place: _Place) -> list[Path]:
    folder = place.folder
    entry = next((folder / name for name in _weight_names() if os.path.lexists(folder / name)), None)
    if entry is None:
        raise UserError(
            f"There is no ControlNet in {shown(folder)}: expected {DIFFUSERS.safetensors}.safetensors. Give the "
            "--output_dir of a finished run."
        )
    check_inside(entry, place.run)
    if not is_index(entry.name):
        return [entry]
    shards = [folder / name for name in shard_names(entry)]
    for shard in shards:
        check_inside(shard, place.run)
    return shards


def _check_header(path: Path, folder: Path) -> None:
    """Raises UserError where there is no such file, or its header would fill the memory."""
    try:
        with open_file(path) as file:
            beginning = file.read(8)
    except ValueError as error:
        raise UserError(f"The ControlNet in {shown(folder)} is not whole ({error}). {_COPY_AGAIN}") from error
    if len(beginning) == 8 and struct.unpack("<Q", beginning)[0] > _LARGEST_HEADER:
        raise UserError(
            f"The ControlNet in {shown(folder)} is not whole ({shown(path)} has no safetensors header, or one of more "
            f"than {_LARGEST_HEADER // MIB} MiB). {_COPY_AGAIN}"
        )


def _weight_names() -> list[str]:
    return [name for name in candidates(DIFFUSERS, None) if "safetensors" in name]


def _has_weights(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in _weight_names())


def _steps_of(folder: Path) -> set[int]:
    try:
        steps = set(map(checkpoint_step, checkpoints_in(folder)))
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be read: {error.strerror}.") from error
    return {step for step in steps if step <= MOST_STEPS}


def _measure(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> tuple[int, Distance]:
    with np.errstate(all="ignore"):  # infinity minus infinity: `Distance.relative` says what that means
        difference = (a - b).ravel()
        flat_a, flat_b = a.ravel(), b.ravel()
        return a.size, Distance(float(difference @ difference), float(flat_a @ flat_a), float(flat_b @ flat_b))


def _check_same_parameters(a: _Weights, b: _Weights) -> None:
    only = [(weights.folder, set(weights.names) - set(other.names)) for weights, other in ((a, b), (b, a))]
    for folder, names in only:
        if names:
            raise UserError(
                f"The ControlNets are of different architectures: only the one in {shown(folder)} has {_some(names)}. "
                "Compare runs of the same base model."
            )
    reshaped = [f"{name} {a.shape(name)} and {b.shape(name)}" for name in a.names if a.shape(name) != b.shape(name)]
    if reshaped:
        raise UserError(
            f"The ControlNets in {shown(a.folder)} and {shown(b.folder)} are of different architectures: the shapes of "
            f"{_some(reshaped)} differ. Compare runs of the same base model."
        )


def _some(names: Iterable[str]) -> str:
    ordered = [shown(name, _LONGEST_NAME) for name in sorted(names)]
    more = len(ordered) - _NAMES_SHOWN
    return ", ".join(ordered[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


_COMPUTING_ORDER = (
    "controlnet_cond_embedding",
    "time_embedding",
    "add_embedding",
    "conv_in",
    "down_blocks",
    "mid_block",
    "controlnet_down_blocks",
    "controlnet_mid_block",
    "unet",
)


def _computing_order(block: str) -> tuple[int, str]:
    first = block.split(".")[0]
    return (_COMPUTING_ORDER.index(first) if first in _COMPUTING_ORDER else len(_COMPUTING_ORDER), block)
