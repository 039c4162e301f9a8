"""Weight files of diffusers' and transformers' folders: which there are, reading them, writing them."""

import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.numpy import save_file

from shared.outgoing.atomic_files import write_atomically, write_text_atomically
from shared.untrusted import MIB, check_plain_files, foreign_library, open_file, read_json, shown, unpickling
from shared.user_errors import UserError

_LARGEST = 64 * 1024 * MIB  # the largest in use is SDXL's UNet in float32, 10 GiB
_FLOATS = ("F16", "BF16", "F32", "F64")
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*\.(safetensors|bin)")
_USE_SAFETENSORS = "Use safetensors weights instead."
_USE_OTHER_DTYPES = "Use weights in float32, float16 or bfloat16."
_DOWNLOAD_AGAIN = (
    "Download or copy it again; a file of some hundred bytes is a Git LFS pointer, which `git lfs pull` replaces."
)


@dataclass(frozen=True)
class WeightNames:
    """How a library calls its weight files, without extension."""

    safetensors: str
    pickled: str


DIFFUSERS = WeightNames("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS = WeightNames("model", "pytorch_model")


class Saveable(Protocol):
    """Anything that knows its size and becomes an array when asked."""

    nbytes: int

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray: ...


# --- which files ----------------------------------------------------------------------------------------------------


def candidates(names: WeightNames, variant: str | None) -> list[str]:
    """File names that may hold a model's weights, or the index of its shards, in the order they are looked for.

    diffusers writes `X.safetensors.index.fp16.json` today and wrote `X.safetensors.fp16.index.json` before
    (`diffusers.models.model_loading_utils._fetch_index_file`); published repositories also have
    `X.fp16.safetensors.index.json`.
    """
    found = []
    for stem, extension in ((names.safetensors, "safetensors"), (names.pickled, "bin")):
        if variant is None:
            found += [f"{stem}.{extension}.index.json", f"{stem}.{extension}"]
        else:
            found += [
                f"{stem}.{extension}.index.{variant}.json",
                f"{stem}.{extension}.{variant}.index.json",
                f"{stem}.{variant}.{extension}.index.json",
                f"{stem}.{variant}.{extension}",
            ]
    return found


class _Index(TypedDict):
    weight_map: dict[str, str]


def shard_names(index: Path) -> list[str]:
    """File names of the shards that an index lists, each once.

    Raises:
        UserError: it cannot be read, is no index, or names something else than files of its own folder.
    """
    fix = "Copy or download the folder again."
    listed: _Index = read_json(index, _Index, fix=fix)
    shards = sorted(set(listed["weight_map"].values()))
    for shard in shards:
        if not _PLAIN_NAME.fullmatch(shard):
            raise UserError(
                f"{shown(index)} lists the shard {shown(repr(shard))}: expected the name of a .safetensors or .bin "
                f"file in the same folder. {fix}"
            )
    if not shards:
        raise UserError(f"{shown(index)} lists no shards: expected one at least. {fix}")
    return shards


def is_index(name: str) -> bool:
    """Whether a weight file's name is that of an index of shards."""
    return name.endswith(".json")


def missing_weights_message(names: WeightNames, variant: str | None, where: str, present: Collection[str]) -> str:
    """What to tell someone whose folder or repository has none of `candidates`."""
    weights = sorted(name for name in present if re.search(r"\.(safetensors|bin|msgpack|ckpt|pt|index\.json)$", name))
    wanted = f"{names.safetensors}{f'.{variant}' if variant else ''}.safetensors"
    kind = f"weights of variant {variant!r}" if variant else "weights"
    there = f"there are {shown(', '.join(weights))}" if weights else "it holds no weight files at all"
    hint = "Pass the variant (--variant) that is there, or none" if weights else "Check the path and the subfolder"
    if weights and all(name.endswith(".msgpack") for name in weights):
        hint = "Flax msgpack weights are not read: save the model as safetensors with an older diffusers"
    return f"No {kind} in {where}: expected {wanted} (or its shards, or .bin), {there}. {hint}."


# --- reading --------------------------------------------------------------------------------------------------------


class StoredTensor(NamedTuple):
    """A tensor of a file, of which nothing but the header was read so far."""

    shape: tuple[int, ...]
    dtype: str  # as the file calls it
    is_float: bool  # of 16, 32 or 64 bits, which is what weights are stored as
    read: Callable[[], np.ndarray]  # before the next tensor is asked for


def read_weights(folder: Path, names: WeightNames, variant: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) for every tensor of a folder's weights, one at a time, in PyTorch's layout.

    dtypes are the file's (bfloat16 as `ml_dtypes.bfloat16`, from `.bin` as float32). Only one tensor is in memory.

    Raises:
        UserError: as `stored_tensors`.
    """
    for name, tensor in stored_tensors(folder, names, variant):
        yield name, tensor.read()


def stored_tensors(folder: Path, names: WeightNames, variant: str | None) -> Iterator[tuple[str, StoredTensor]]:
    """`read_weights` for those who first look at a tensor's shape: it may be larger than any memory.

    Raises:
        UserError: there are no weights of this variant, a file is missing, damaged, no regular file or larger than any
            honest one, or `.bin` is all there is and torch is not installed.
    """
    for path in weight_files(folder, names, variant):
        yield from _pickled_tensors(path) if path.suffix == ".bin" else _safetensors(path)


def weight_files(folder: Path, names: WeightNames, variant: str | None) -> Iterator[Path]:
    """The files that hold a model's weights, each looked at when it is asked for.

    Raises:
        UserError: there are no weights of this variant, or a file is missing, no regular file or larger than any honest
            one.
    """
    present = set(names_in(folder))
    entry = next((name for name in candidates(names, variant) if name in present), None)
    if entry is None:
        raise UserError(missing_weights_message(names, variant, str(folder), present))
    shards = shard_names(folder / entry) if is_index(entry) else [entry]
    for shard in shards:
        if shard not in present:
            raise UserError(
                f"{shown(folder / entry)} lists the shard {shown(shard)}, which is not there. Copy or download "
                "the folder again."
            )
        check_plain_files([folder / shard], _LARGEST)
        yield folder / shard


def safetensors_files(folder: Path, names: WeightNames) -> list[Path]:
    """`weight_files` of a model that is handed to a library, which would unpickle others.

    Raises:
        UserError: as `weight_files`, or one is a pickle.
    """
    shards = list(weight_files(folder, names, None))
    for shard in shards:
        if shard.suffix != ".safetensors":
            raise UserError(
                f"{shown(shard)} is a PyTorch pickle: expected safetensors weights. Convert the model where you trust "
                "it: load it with transformers and call save_pretrained(folder)."
            )
    return shards


def names_in(folder: Path) -> list[str]:
    """What lies in a folder. UserError where that cannot be told."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be read: {error.strerror}.") from error


def _safetensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    with (
        foreign_library(f"{shown(path)} is not a whole safetensors file", _DOWNLOAD_AGAIN),
        safe_open(path, framework="np") as file,
    ):
        for name in file.keys():  # noqa: SIM118 (not a dict)
            header = file.get_slice(name)
            dtype = str(header.get_dtype())
            read = partial(_from_safetensors, path, file, name)
            yield name, StoredTensor(tuple(header.get_shape()), dtype, dtype in _FLOATS, read)


def _from_safetensors(path: Path, file: Any, name: str) -> np.ndarray:
    with foreign_library(f"{shown(path)} holds a tensor that cannot be read", _USE_OTHER_DTYPES):
        return file.get_tensor(name)


def _pickled_tensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{shown(path)} is a PyTorch pickle and reading it needs torch, which is not installed. Install torch "
            "(the CPU build is enough), or convert the model to safetensors where torch is: load it with diffusers "
            "or transformers and call save_pretrained(folder, safe_serialization=True)."
        )
    import torch

    tensors = _unpickled(path)
    if not isinstance(tensors, dict):
        raise UserError(
            f"{shown(path)} holds a {type(tensors).__name__}: expected a dictionary of tensors. {_USE_SAFETENSORS}"
        )
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{shown(path)} holds a {type(tensor).__name__} named {shown(repr(name))}: expected tensors, and texts "
                f"for their names. {_USE_SAFETENSORS}"
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        is_float = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        yield name, StoredTensor(tuple(tensor.shape), dtype, is_float, partial(_as_array, path, tensor))


def _unpickled(path: Path) -> Any:
    import torch

    with unpickling(shown(path), "is not a whole PyTorch file", _DOWNLOAD_AGAIN, _USE_SAFETENSORS):
        is_zip = _is_zip(path)
        if is_zip:
            _check_not_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _check_not_compressed(path: Path) -> None:
    """torch never compresses, and what is compressed may unfold to more than any memory holds."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UserError("its parts are compressed")


def _as_array(path: Path, tensor: Any) -> np.ndarray:
    import torch

    with foreign_library(f"{shown(path)} holds a tensor of an unusual kind", _USE_SAFETENSORS):
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def _is_zip(path: Path) -> bool:
    """Whether a pickle is of the format since PyTorch 1.6, the only one that can be memory-mapped."""
    with open_file(path) as file:
        return file.read(4) == b"PK\x03\x04"


# --- writing --------------------------------------------------------------------------------------------------------


def write_weights(
    folder: Path,
    arrays: Mapping[str, Saveable],
    names: WeightNames,
    variant: str | None,
    max_shard_size: int | str | None,
) -> None:
    """Write arrays in PyTorch's layout as safetensors, sharded with an index where they pass `max_shard_size`.

    Every file appears whole or not at all. Weights of the same variant that were there before and are not part of
    what was written are removed, so that no reader finds two models in one folder.
    """
    suffix = f".{variant}" if variant else ""
    index = candidates(names, variant)[0]
    shards = _split(arrays, f"{names.safetensors}{suffix}{{suffix}}.safetensors", max_shard_size)
    for file, group in shards.filename_to_tensors.items():
        _write_safetensors(folder / file, {name: arrays[name] for name in group})
    if shards.is_sharded:
        content = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_text_atomically(folder / index, json.dumps(content, indent=2, sort_keys=True) + "\n")
    written = {*shards.filename_to_tensors, *([index] if shards.is_sharded else [])}
    _remove_stale(folder, names, variant, written)


def _split(arrays: Mapping[str, Saveable], file_pattern: str, max_shard_size: int | str | None) -> StateDictSplit:
    """Which array goes into which file; one larger than the limit has a file of its own."""
    try:
        return split_state_dict_into_shards_factory(
            dict(arrays),
            get_storage_size=lambda array: array.nbytes,
            filename_pattern=file_pattern,
            max_shard_size=sys.maxsize if max_shard_size is None else max_shard_size,
        )
    except ValueError as error:
        raise UserError(
            f"max_shard_size is {max_shard_size!r}: expected bytes as an integer, or a text like '500MB' or '5GB'."
        ) from error


def _write_safetensors(path: Path, arrays: Mapping[str, Saveable]) -> None:
    tensors = {name: np.asarray(array) for name, array in arrays.items()}
    # transformers refuses files whose metadata do not name the framework
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def _remove_stale(folder: Path, names: WeightNames, variant: str | None, written: Collection[str]) -> None:
    suffix = re.escape(f".{variant}") if variant else ""
    shard = re.compile(rf"{re.escape(names.safetensors)}{suffix}-\d{{5}}-of-\d{{5}}\.safetensors")
    for path in list(folder.iterdir()):
        is_weights = path.name in candidates(names, variant) or shard.fullmatch(path.name)
        if is_weights and path.name not in written:
            path.unlink()
