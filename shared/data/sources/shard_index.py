"""The index beside local shards: where every sample lies, so that a start reads no headers and holds no samples.

A file `FIRST_SHARD.shard_index` in the shards' folder, little-endian:

    magic, version u32, length of the description u32, SHA-256 of the description
    description: JSON of `Description`
    records: for each sample, shard after shard, one of `record_of`
    keys: for each shard, the keys of its samples one after the other, UTF-8

A record has, of image, condition and caption in turn: the offsets of their contents in the shard, their sizes, the
CRC-32 of their headers (so that a shard that was written anew is noticed before a byte of it is taken for another),
and which of the description's extensions they have, 255 for a part that is not there; then where the sample's key
begins among those of its shard, and its length. Records stay in the file and are read one at a time.

Version 1 has one condition of each sample. Version 2 differs in nothing but that it has several.
"""

import hashlib
import itertools
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shared.config.options import MOST_CONDITIONS
from shared.data.sources.shard_layout import HEADER, IndexedSample, Member, Shard
from shared.data.sources.tar_reading import read_at
from shared.untrusted import MIB, open_file, parse_json, sha256_from, shown
from shared.user_errors import UserError

SUFFIX = ".shard_index"
MAGIC = b"\x93SHARDS\n"
PREFIX = struct.Struct("<8sII32s")
ABSENT = 255

_LARGEST_DESCRIPTION = 64 * MIB  # half a million shards, the most of any public collection, need 50
_AT_ONCE = 2**14  # records
_FIX = "Delete it, or make it again with python3 -m shared.prepare_data index."
_PARTS_OF_VERSION_1 = 3  # image, condition, caption
_MOST_PARTS = MOST_CONDITIONS + 2

Columns = list[list[str]]
"""The extensions that may hold image, conditions and caption, best first: a list for each part."""


def record_of(parts: int) -> struct.Struct:
    """The layout of a record of so many parts."""
    return struct.Struct(f"<{parts}Q{parts}I{parts}I{parts}BIH")


def extensions_of(parts: int) -> slice:
    """Where in a record's bytes it stands which extensions its parts have."""
    return slice(16 * parts, 17 * parts)


def version_of(columns: Columns) -> int:
    """Of an index with these."""
    return 1 if len(columns) == _PARTS_OF_VERSION_1 else 2


@dataclass(frozen=True)
class IndexedShard:
    """What an index says of a shard.

    Attributes:
        name: its file, in the index's folder.
        size: of the file in bytes; one of another size has changed.
        modified: nanoseconds, by which `prepare_data index` knows which shards to read again.
        samples: how many it holds.
        key_bytes: of all their keys.
    """

    name: str
    size: int
    modified: int
    samples: int
    key_bytes: int


@dataclass(frozen=True)
class Description:
    """What an index says of its shards and of itself.

    Attributes:
        columns: those looked for, to which records refer by number.
        shards: in the order of the records.
        fingerprint: of all shards in this order, see `shared.data.sources.indexed_samples.fingerprint_of`; None where
            not all are in it yet.
        sha256: of everything after the description.
    """

    columns: Columns
    shards: list[IndexedShard]
    fingerprint: str | None
    sha256: str


class _Place(NamedTuple):
    """Where a shard's part of an index begins."""

    records: int
    keys: int


class ShardIndex:
    """One index, checked and open. Safe to use from several threads."""

    def __init__(self, path: Path, named: str | None = None) -> None:
        """Reads what it says of the shards.

        Args:
            path: of the file, which may be deleted after this.
            named: what messages call it, if not by its path.

        Raises:
            UserError: it cannot be read, is damaged, or is of another version.
        """
        self.name = str(path) if named is None else named
        with open_file(path) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self.description, self._begin = self._read_description()
        self._record = record_of(len(self.description.columns))
        self._places = self._check_layout(os.fstat(self._descriptor).st_size)

    def check_contents(self) -> None:
        """Raises UserError where the records are not those that were written. Reads the whole file."""
        try:
            digest = sha256_from(self._descriptor, self._begin)
        except OSError as error:
            raise self._unreadable(error) from error
        if digest != self.description.sha256:
            raise self._damaged("its records are not what was written")

    def sample(self, number: int, row: int, shard: Shard) -> IndexedSample:
        """The sample of a row of the shard of a number; `shard` is where that lies."""
        size = self._record.size
        return self._decoded(number, shard, self._read(self._places[number].records + row * size, size))

    def samples(self, number: int, shard: Shard) -> Iterator[IndexedSample]:
        """All samples of a shard, in its order."""
        begin, count = self._places[number].records, self.description.shards[number].samples
        size = self._record.size
        for row in range(0, count, _AT_ONCE):
            records = self._read(begin + row * size, min(_AT_ONCE, count - row) * size)
            for place in range(0, len(records), size):
                yield self._decoded(number, shard, records[place : place + size])

    def content_of(self, number: int) -> tuple[bytes, bytes]:
        """The records and the keys of a shard, as they stand in the file."""
        shard, place = self.description.shards[number], self._places[number]
        return self._read(place.records, shard.samples * self._record.size), self._read(place.keys, shard.key_bytes)

    def _read_description(self) -> tuple[Description, int]:
        prefix = self._read(0, PREFIX.size)
        magic, version, length, digest = PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise self._damaged("it does not begin as one")
        if version not in (1, 2):
            raise UserError(f"{shown(self.name)} is an index of version {version}; expected 1 or 2. {_FIX}")
        if length > _LARGEST_DESCRIPTION:
            raise self._damaged(f"its description claims {length:,} bytes")
        content = self._read(PREFIX.size, length)
        if hashlib.sha256(content).digest() != digest:
            raise self._damaged("its description is not what was written")
        description: Description = parse_json(content, Description, where=self.name, fix=_FIX)
        parts = len(description.columns)
        if not _PARTS_OF_VERSION_1 <= parts <= _MOST_PARTS or version_of(description.columns) != version:
            raise self._damaged(f"it speaks of {parts} parts of a sample, as version {version} does not")
        return description, PREFIX.size + length

    def _check_layout(self, file_size: int) -> list[_Place]:
        shards, columns = self.description.shards, self.description.columns
        if any(len(column) > ABSENT for column in columns):
            raise self._damaged(f"it looks for more than {ABSENT} extensions")
        for shard in shards:
            if min(shard.size, shard.samples, shard.key_bytes) < 0:
                raise self._damaged("it holds a negative number")
            if shard.name != os.path.basename(shard.name) or shard.name in ("", ".", "..") or "\0" in shard.name:
                raise self._damaged(f"{shown(shard.name)!r} is no file of its folder")
        size = self._record.size
        keys_begin = self._begin + size * sum(shard.samples for shard in shards)
        expected = keys_begin + sum(shard.key_bytes for shard in shards)
        if expected != file_size:
            raise self._damaged(f"it has {file_size:,} bytes, and its description speaks of {expected:,}")
        records = itertools.accumulate((shard.samples * size for shard in shards), initial=self._begin)
        keys = itertools.accumulate((shard.key_bytes for shard in shards), initial=keys_begin)
        return [_Place(*both) for both in zip(records, keys, strict=True)]

    def _decoded(self, number: int, shard: Shard, record: bytes) -> IndexedSample:
        fields, count = self._record.unpack(record), len(self.description.columns)
        offsets, sizes, headers, extensions = (fields[place : place + count] for place in range(0, 4 * count, count))
        key_begin, key_length = fields[4 * count :]
        described = self.description.shards[number]
        if key_begin + key_length > described.key_bytes:
            raise self._damaged("a key lies beyond the others")
        key = self._read(self._places[number].keys + key_begin, key_length).decode("utf-8", "surrogateescape")
        parts: list[Member | None] = []
        for column, extension, offset, size, header in zip(
            self.description.columns, extensions, offsets, sizes, headers, strict=True
        ):
            if extension == ABSENT:
                parts.append(None)
                continue
            if extension >= len(column) or not HEADER <= offset <= offset + size <= described.size:
                raise self._damaged(f"a sample lies outside of {shown(described.name)}")
            parts.append(Member(column[extension], offset, size, header))
        return IndexedSample.of_parts(shard, key, parts)

    def _read(self, position: int, count: int) -> bytes:
        try:
            content = read_at(self._descriptor, position, count)
        except OSError as error:
            raise self._unreadable(error) from error
        if len(content) < count:
            raise self._damaged("it is cut off")
        return content

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"{shown(self.name)} cannot be read: {error.strerror}. {_FIX}")

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{shown(self.name)} is no whole index of shards: {reason}. {_FIX}")
