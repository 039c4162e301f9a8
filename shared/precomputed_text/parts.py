"""One file of encoded texts, in safetensors' format, of which a row is read at a time.

`__metadata__.sha256` is of everything after the header; `keys` U8 [N,32] says which text a row is of; then come the
arrays of a `Layout`, each [N, …]. The header of a file is the one that is written here, byte for byte, or the file is
damaged.

Rows are read and not mapped into memory: a mapped file that is cut while it is used ends the process.
"""

import fcntl
import itertools
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from shared.outgoing.atomic_files import write_atomically
from shared.precomputed_text.layout import Layout
from shared.untrusted import open_file, parse_json, sha256_from, shown
from shared.user_errors import UserError

KEY_BYTES = 32
MOST_TEXTS = 2**20  # of one file

_LENGTH_BYTES = 8
_LONGEST_HEADER = 4096  # bytes: ours has some 400
_NO_DIGEST = "0" * 64


class _Entry(TypedDict):
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=MOST_TEXTS)]], Meta(min_length=2)]


class _Metadata(TypedDict):
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


_Header = TypedDict("_Header", {"__metadata__": _Metadata, "keys": _Entry})


class TextPart:
    """An open file of encoded texts. It stays readable if its name is taken or removed."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Reads the header and the keys.

        Raises:
            UserError: it cannot be read, or its size or header is not what was written; the message names it.
        """
        self.path, self._layout = path, layout
        with open_file(path) as file:
            self._descriptor = os.dup(file.fileno())
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        try:
            self._count, self._digest = self._read_header()
            self._data = len(_header(layout, self._count, self._digest))
            self._places = _places(layout, self._count)
            expected = self._data + _size(layout, self._count)
            size = os.fstat(self._descriptor).st_size
            if size != expected:
                raise UserError(f"{shown(path)} has {size:,} bytes: expected {expected:,}.")
            keys = bytearray(self._count * KEY_BYTES)
            self._read_at(self._data, memoryview(keys))
            self.keys = [bytes(keys[start : start + KEY_BYTES]) for start in range(0, len(keys), KEY_BYTES)]
        except BaseException:
            self.close()
            raise

    def read(self, name: str, row: int, out: npt.NDArray[Any]) -> None:
        """Fill `out` with an array of one text.

        Raises:
            UserError: the file was cut meanwhile, or the disk fails.
        """
        place = self._data + self._places[name] + row * self._layout.bytes_of(name)
        self._read_at(place, out.data.cast("B"))

    def is_whole(self) -> bool:
        """Whether all of it is what was written: reads the whole file.

        Raises:
            UserError: the disk fails.
        """
        try:
            return sha256_from(self._descriptor, self._data) == self._digest
        except OSError as error:
            raise UserError(f"{shown(self.path)} cannot be read: {error.strerror}.") from error

    def close(self) -> None:
        """Which also happens when nothing refers to it any more."""
        self._closing()

    def _read_header(self) -> tuple[int, str]:
        """(N, digest)."""
        length = bytearray(_LENGTH_BYTES)
        self._read_at(0, memoryview(length))
        header = bytearray(min(int.from_bytes(length, "little"), _LONGEST_HEADER))
        self._read_at(_LENGTH_BYTES, memoryview(header))
        read: _Header = parse_json(bytes(header), _Header, where=str(self.path), fix="Delete it.")
        count, digest = read["keys"]["shape"][0], read["__metadata__"]["sha256"]
        if bytes(length + header) != _header(self._layout, count, digest):
            raise UserError(f"{shown(self.path)} has another header than was written.")
        return count, digest

    def _read_at(self, place: int, out: memoryview) -> None:
        try:
            while out:
                count = os.preadv(self._descriptor, [out], place)
                if count == 0:
                    raise UserError(f"{shown(self.path)} ends before its time. Start the run again.")
                out, place = out[count:], place + count
        except OSError as error:
            raise UserError(f"{shown(self.path)} cannot be read: {error.strerror}.") from error


def write_part(
    path: Path, layout: Layout, keys: Sequence[bytes], encoded: Iterator[Mapping[str, npt.NDArray[Any]]]
) -> None:
    """A whole file, or none; the arrays [rows, …] of `encoded` are those of `keys` in their order.

    While it is written, its temporary file is locked (see `remove_leftovers`).

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(path, lambda temporary: _write(temporary, layout, keys, encoded))


def remove_leftovers(folder: Path, *, older_than: float) -> None:
    """What writers that were killed left behind. Those that live hold a lock of theirs.

    Args:
        older_than: a time since the epoch; what is younger may not be locked yet.
    """
    for path in folder.glob(".*.tmp"):
        # Gone meanwhile, another user's, or on a file system without locks: then nothing can be told of it.
        with suppress(OSError, UserError), open_file(path) as file:
            if os.fstat(file.fileno()).st_mtime < older_than:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _write(
    temporary: Path, layout: Layout, keys: Sequence[bytes], encoded: Iterator[Mapping[str, npt.NDArray[Any]]]
) -> None:
    data, places = len(_header(layout, len(keys), _NO_DIGEST)), _places(layout, len(keys))
    with temporary.open("r+b") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.seek(data)
        file.write(b"".join(keys))
        row = 0
        for arrays in encoded:
            for name, shape in layout.shapes.items():
                assert arrays[name].dtype == layout.dtype, name
                assert arrays[name].shape[1:] == shape, name
                file.seek(data + places[name] + row * layout.bytes_of(name))
                file.write(np.ascontiguousarray(arrays[name]).data)
            row += len(arrays["prompt_embeds"])
        assert row == len(keys), "every text was encoded"
        file.flush()
        digest = sha256_from(file.fileno(), data)
        file.seek(0)
        file.write(_header(layout, len(keys), digest))


def _places(layout: Layout, count: int) -> dict[str, int]:
    """Where each array begins after the header."""
    places, end = {}, count * KEY_BYTES
    for name in layout.shapes:
        places[name] = end
        end += count * layout.bytes_of(name)
    return places


def _size(layout: Layout, count: int) -> int:
    return count * (KEY_BYTES + layout.bytes_per_text)


def _header(layout: Layout, count: int, digest: str) -> bytes:
    """Its length, and JSON filled up to a multiple of 8 bytes, as safetensors has it; as long whatever the digest."""
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {"keys": ("U8", (KEY_BYTES,))}
    kinds |= {name: (layout.stored_dtype, shape) for name, shape in layout.shapes.items()}
    borders = itertools.pairwise([0, *_places(layout, count).values(), _size(layout, count)])
    entries = {
        name: {"dtype": dtype, "shape": [count, *shape], "data_offsets": list(offsets)}
        for (name, (dtype, shape)), offsets in zip(kinds.items(), borders, strict=True)
    }
    content = json.dumps({"__metadata__": {"sha256": digest}} | entries).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(_LENGTH_BYTES, "little") + content
