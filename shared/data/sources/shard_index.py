"""The index beside local shards: where every sample lies, so that a start reads no headers and holds no samples.

A file `FIRST_SHARD.shard_index` in the shards' folder, little-endian:

    magic, version u32, length of the description u32, SHA-256 of the description
    description: JSON of `Description`
    records: for each sample, shard after shard, `RECORD`
    keys: for each shard, the keys of its samples one after the other, UTF-8

A record has, of image, condition and caption in turn: the offsets of their contents in the shard, their sizes, the
CRC-32 of their headers (so that a shard that was written anew is noticed before a byte of it is taken for another),
and which of the description's extensions they have, 255 for a part that is not there; then where the sample's key
begins among those of its shard, and its length. Records stay in the file and are read one at a time.
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

from shared.data.sources.shard_keys import ShardKeys
from shared.data.sources.shard_layout import HEADER, IndexedSample, Member, Shard
from shared.data.sources.tar_reading import read_at
from shared.untrusted import MIB, open_file, parse_json, sha256_from, shown
from shared.user_errors import UserError

SUFFIX = ".shard_index"
MAGIC = b"\x93SHARDS\n"
VERSION = 1
PREFIX = struct.Struct("<8sII32s")
RECORD = struct.Struct("<3Q3I3I3BIH")
EXTENSIONS = slice(48, 51)  # of a record's bytes
ABSENT = 255

_LARGEST_DESCRIPTION = 64 * MIB  # half a million shards, the most of any public collection, need 50
_AT_ONCE = 2**14  # records
_FIX = "Delete it, or make it again with python3 -m shared.prepare_data index."
_PARTS = 3  # image, condition, caption

Columns = tuple[list[str], list[str], list[str]]
"""The extensions that may hold image, condition and caption, best first."""


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
        return self._decoded(number, shard, self._read(self._places[number].records + row * RECORD.size, RECORD.size))

    def samples(self, number: int, shard: Shard) -> Iterator[IndexedSample]:
        """All samples of a shard, in its order."""
        begin, count = self._places[number].records, self.description.shards[number].samples
        for row in range(0, count, _AT_ONCE):
            records = self._read(begin + row * RECORD.size, min(_AT_ONCE, count - row) * RECORD.size)
            for place in range(0, len(records), RECORD.size):
                yield self._decoded(number, shard, records[place : place + RECORD.size])

    def content_of(self, number: int) -> tuple[bytes, bytes]:
        """The records and the keys of a shard, as they stand in the file."""
        shard, place = self.description.shards[number], self._places[number]
        return self._read(place.records, shard.samples * RECORD.size), self._read(place.keys, shard.key_bytes)

    def _read_description(self) -> tuple[Description, int]:
        prefix = self._read(0, PREFIX.size)
        magic, version, length, digest = PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise self._damaged("it does not begin as one")
        if version != VERSION:
            raise UserError(f"{shown(self.name)} is an index of version {version}; expected {VERSION}. {_FIX}")
        if length > _LARGEST_DESCRIPTION:
            raise self._damaged(f"its description claims {length:,} bytes")
        content = self._read(PREFIX.size, length)
        if hashlib.sha256(content).digest() != digest:
            raise self._damaged("its description is not what was written")
        description: Description = parse_json(content, Description, where=self.name, fix=_FIX)
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
        keys_begin = self._begin + RECORD.size * sum(shard.samples for shard in shards)
        expected = keys_begin + sum(shard.key_bytes for shard in shards)
        if expected != file_size:
            raise self._damaged(f"it has {file_size:,} bytes, and its description speaks of {expected:,}")
        records = itertools.accumulate((shard.samples * RECORD.size for shard in shards), initial=self._begin)
        keys = itertools.accumulate((shard.key_bytes for shard in shards), initial=keys_begin)
        return [_Place(*both) for both in zip(records, keys, strict=True)]

    def _decoded(self, number: int, shard: Shard, record: bytes) -> IndexedSample:
        fields = RECORD.unpack(record)
        offsets, sizes, headers, extensions = (fields[place : place + _PARTS] for place in range(0, 12, _PARTS))
        key_begin, key_length = fields[12:]
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
        return IndexedSample(shard, key, *parts)

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


def columns_of(keys: ShardKeys) -> Columns:
    return list(keys.image), list(keys.conditioning_image), list(keys.caption)
