"""Reading the Flax backend's Orbax checkpoints without Orbax or JAX: TensorStore finds each array by its name.

checkpoint-N/
  record/metadata  JSON: what the checkpoint belongs to
  state/           a database of zarr arrays: `step`, `params.NAME`, `mu.NAME`, `nu.NAME`; `loss_scaler.scale` and
                   `loss_scaler.growth_tracker`, where there is one; `ema.NAME`, where the run averages its parameters
  state/_METADATA  JSON: which arrays those are
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import tensorstore

from shared.checkpoints.arrays import Layout
from shared.checkpoints.policy import RESUME_FROM_ANOTHER, Record
from shared.untrusted import check_plain_tree, foreign_library, read_json, shown
from shared.user_errors import UserError

_STATE, _RECORD = "state", "record/metadata"
_MOST_FILES = 100_000  # a hundred for each of a thousand processes
_COMPRESSORS = (None, "zstd")  # Orbax's, whose decoder ends where the array does
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class _Key(TypedDict):
    key: str


class _Entry(TypedDict):
    key_metadata: list[_Key]


class _Metadata(TypedDict):
    tree_metadata: dict[str, _Entry]


def is_orbax_checkpoint(checkpoint: Path) -> bool:
    """Whether Orbax wrote this checkpoint."""
    return os.path.isfile(checkpoint / _STATE / "manifest.ocdbt")


def read_record(checkpoint: Path) -> Record:
    """What the checkpoint says about the run it belongs to.

    Raises:
        UserError: it is damaged.
    """
    _check_files(checkpoint)
    record: Record = read_json(checkpoint / _RECORD, Record, fix=RESUME_FROM_ANOTHER)
    return record


@dataclass(frozen=True)
class StoredArrays:
    """Of a checkpoint, described and not read yet, by names such as `params/conv_in.weight`."""

    checkpoint: Path
    stores: dict[str, tensorstore.TensorStore]

    @property
    def layouts(self) -> dict[str, Layout]:
        return {name: Layout(store.dtype.name, tuple(store.shape)) for name, store in self.stores.items()}

    def read(self) -> dict[str, np.ndarray]:
        """Whole, however many devices they were divided between when they were saved.

        Raises:
            UserError: one is damaged, or the loss scale is none.
        """
        with _foreign_library(self.checkpoint):
            reads = {name: store.read() for name, store in self.stores.items()}
            arrays = {name: np.asarray(read.result()) for name, read in reads.items()}
        scale = arrays.get("loss_scaler/scale")
        # An infinite one would never become finite again.
        if scale is not None and not 0 < float(scale) <= _FLOAT32_MAX:
            raise UserError(f"{shown(self.checkpoint)} holds {scale} as the loss scale. {RESUME_FROM_ANOTHER}")
        return arrays


def open_arrays(checkpoint: Path) -> StoredArrays:
    """Find the arrays of a checkpoint.

    Raises:
        UserError: it is damaged, or stores its arrays as Orbax does not.
    """
    _check_files(checkpoint)
    path = checkpoint / _STATE / "_METADATA"
    metadata: _Metadata = read_json(path, _Metadata, fix=RESUME_FROM_ANOTHER)
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{checkpoint.absolute() / _STATE}/"}}
    with _foreign_library(checkpoint):
        keys = tensorstore.KvStore.open(database).result().list().result()
        names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
        opened = [tensorstore.open(_zarr(database, name), read=True, open=True) for name in names]
        stores = {name.replace(".", "/", 1): store.result() for name, store in zip(names, opened, strict=True)}
        specs = {name: store.spec().to_json() for name, store in stores.items()}
    listed = {".".join(key["key"] for key in entry["key_metadata"]) for entry in metadata["tree_metadata"].values()}
    if listed != set(names):
        raise UserError(f"{shown(path)} lists other arrays than are stored. {RESUME_FROM_ANOTHER}")
    for name, store in stores.items():
        _check_stored_as_usual(checkpoint, name, store, specs[name])
    return StoredArrays(checkpoint, stores)


def torch_layout(array: np.ndarray) -> np.ndarray:
    """Flax's WHIO and [in, out] → OIHW and [out, in]. (What is trained has no other arrays of these ranks.)"""
    return np.ascontiguousarray(array.T if array.ndim in (2, 4) else array)


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that `torch_layout` gives an array of this one."""
    return shape[::-1] if len(shape) in (2, 4) else shape


def _zarr(database: dict[str, Any], name: str) -> dict[str, Any]:
    # What is not stored would otherwise be read as zeros.
    return {"driver": "zarr", "kvstore": database | {"path": name}, "fill_missing_data_reads": False}


def _check_stored_as_usual(checkpoint: Path, name: str, store: tensorstore.TensorStore, spec: dict[str, Any]) -> None:
    """Reading takes the memory of a whole chunk, however small the array is."""
    chunk = [size or 0 for size in store.chunk_layout.read_chunk.shape or ()]
    compressor = (spec["metadata"].get("compressor") or {}).get("id")
    if math.prod(chunk) > max(1, math.prod(store.shape)) or compressor not in _COMPRESSORS:
        raise UserError(
            f"{shown(checkpoint)} stores {shown(name)} in pieces of {chunk} with the compressor "
            f"{shown(compressor)}, as no version of this trainer does. {RESUME_FROM_ANOTHER}"
        )


def _check_files(checkpoint: Path) -> None:
    check_plain_tree(checkpoint, _MOST_FILES)


@contextmanager
def _foreign_library(checkpoint: Path) -> Iterator[None]:
    with foreign_library(f"{shown(checkpoint)} cannot be read", RESUME_FROM_ANOTHER):
        try:
            yield
        except ValueError as error:  # TensorStore appends the specification of every driver
            raise UserError(str(error).partition(" [tensorstore_spec")[0]) from error
