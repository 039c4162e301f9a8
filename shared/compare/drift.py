"""How far two ControlNets lie apart, tensor by tensor; never more than one tensor of each is in memory.

Where a UNet's decoder was trained with them, it counts as part of them.
"""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from shared.checkpoint_policy import CHECKPOINT_PREFIX, checkpoint_step, checkpoints_in
from shared.model_files.weight_files import DIFFUSERS, candidates, is_index
from shared.portable_checkpoint import CONTROLNET_FOLDER
from shared.trained_parts import UNET_FOLDER, UNET_PREFIX, is_decoder, prefixed

_NAMES_SHOWN = 3


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
        return 0.0 if self.difference == 0 else math.sqrt(self.difference / max(self.a, self.b))

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
        ValueError: there is no safetensors file, it is damaged, or the models have other parameters.
    """
    with _Weights(folder_a) as a, _Weights(folder_b) as b:
        _check_same_parameters(a, b)
        return Drift([TensorDistance(name, *_measure(a.read(name), b.read(name))) for name in a.names])


def common_checkpoints(folder_a: Path, folder_b: Path) -> tuple[list[int], list[int]]:
    """Steps of the checkpoints in both run folders whose ControlNet can be read in both, and of those where not."""
    common = sorted(_steps_of(folder_a) & _steps_of(folder_b))
    readable = [step for step in common if all(map(_has_weights, checkpoint_folders(folder_a, folder_b, step)))]
    return readable, [step for step in common if step not in readable]


def checkpoint_folders(folder_a: Path, folder_b: Path, step: int) -> tuple[Path, Path]:
    """Where the ControlNets of a common checkpoint are."""
    name = f"{CHECKPOINT_PREFIX}{step}"
    return folder_a / name / CONTROLNET_FOLDER, folder_b / name / CONTROLNET_FOLDER


class _Weights:
    """What was trained, from the safetensors of a folder, whole or in shards, read tensor by tensor."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._closing = ExitStack()
        try:
            self._found = self._open(folder)
            if (folder / UNET_FOLDER).is_dir():  # of a run with --sd_unlocked
                unet = self._open(folder / UNET_FOLDER)
                self._found |= prefixed({name: found for name, found in unet.items() if is_decoder(name)})
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(
                f"The ControlNet in {folder} is not whole ({error}). Copy the folder again, or run the training again."
            ) from error

    def _open(self, folder: Path) -> dict[str, tuple[Any, str]]:
        """By name: the file, and the name in it."""
        files = [self._closing.enter_context(safe_open(path, framework="np")) for path in _files(folder)]
        return {name: (file, name) for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)

    @property
    def names(self) -> list[str]:
        return sorted(self._found)

    def shape(self, name: str) -> list[int]:
        file, name_there = self._found[name]
        return list(file.get_slice(name_there).get_shape())

    def read(self, name: str) -> npt.NDArray[np.float64]:
        file, name_there = self._found[name]
        return np.asarray(file.get_tensor(name_there), np.float64)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()


def _files(folder: Path) -> list[Path]:
    entry = next((folder / name for name in _weight_names() if (folder / name).is_file()), None)
    if entry is None:
        raise ValueError(
            f"There is no ControlNet in {folder}: expected {DIFFUSERS.safetensors}.safetensors. Give the --output_dir "
            "of a finished run."
        )
    if not is_index(entry.name):
        return [entry]
    return sorted({folder / shard for shard in json.loads(entry.read_text(encoding="utf-8"))["weight_map"].values()})


def _weight_names() -> list[str]:
    return [name for name in candidates(DIFFUSERS, None) if "safetensors" in name]


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _weight_names())


def _steps_of(folder: Path) -> set[int]:
    return set(map(checkpoint_step, checkpoints_in(folder)))


def _measure(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> tuple[int, Distance]:
    with np.errstate(invalid="ignore"):  # infinity minus infinity: `Distance.relative` says what that means
        difference = (a - b).ravel()
    flat_a, flat_b = a.ravel(), b.ravel()
    return a.size, Distance(float(difference @ difference), float(flat_a @ flat_a), float(flat_b @ flat_b))


def _check_same_parameters(a: _Weights, b: _Weights) -> None:
    only = [(weights.folder, set(weights.names) - set(other.names)) for weights, other in ((a, b), (b, a))]
    for folder, names in only:
        if names:
            raise ValueError(
                f"The ControlNets are of different architectures: only the one in {folder} has {_some(names)}. Compare "
                "runs of the same base model."
            )
    reshaped = [f"{name} {a.shape(name)} and {b.shape(name)}" for name in a.names if a.shape(name) != b.shape(name)]
    if reshaped:
        raise ValueError(
            f"The ControlNets in {a.folder} and {b.folder} are of different architectures: the shapes of "
            f"{_some(reshaped)} differ. Compare runs of the same base model."
        )


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
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
