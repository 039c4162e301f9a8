"""Making the index of a shard from its headers, and writing one of many shards. `shard_index` tells the format."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shared.data.sources.shard_index import (
    ABSENT,
    MAGIC,
    PREFIX,
    Columns,
    Description,
    IndexedShard,
    extensions_of,
    record_of,
    version_of,
)
from shared.data.sources.shard_keys import ShardKeys
from shared.data.sources.shard_layout import HEADER, Member
from shared.data.sources.shards import member_groups
from shared.data.sources.tar_reading import read_at
from shared.outgoing.atomic_files import write_atomically
from shared.untrusted import open_file, shown
from shared.user_errors import UserError

_LARGEST_MEMBER = 2**32 - 1  # bytes; of a sample, which is hundreds of times what a picture has
_LONGEST_KEY = 2**16 - 1


@dataclass(frozen=True)
class ShardContent:
    """A shard's part of an index."""

    shard: IndexedShard
    records: bytes
    keys: bytes

    def lacking(self, parts: int) -> list[int]:
        """How many samples lack each of so many parts."""
        records = np.frombuffer(self.records, np.uint8).reshape(-1, record_of(parts).size)
        return np.sum(records[:, extensions_of(parts)] == ABSENT, axis=0).tolist()


def read_shard(path: Path, keys: ShardKeys) -> ShardContent:
    """From the headers of a tar. A sample may lack its conditions or its caption, which other files may bring.

    Raises:
        UserError: it is no uncompressed tar, its first sample has no image, or a sample is larger than any honest one.
    """
    records, names, count = bytearray(), bytearray(), 0
    columns = keys.columns
    with open_file(path) as file:
        status = os.fstat(file.fileno())
        for number, (key, members) in enumerate(member_groups(path)):
            found = keys.find(members)
            if number == 0 and found[0] is None:
                keys.check(members, shown(path))
            parts = [members[extension] if extension else None for extension in found]
            name = key.encode("utf-8", "surrogateescape")
            if len(name) > _LONGEST_KEY or any(part and part.size > _LARGEST_MEMBER for part in parts):
                raise UserError(f"{shown(path)} holds a sample larger than any honest one, {shown(key)}; leave it out")
            try:
                records += _record(file, columns, parts, len(names), len(name))
            except OSError as error:
                raise UserError(f"{shown(path)} cannot be read: {error.strerror}.") from error
            names += name
            count += 1
    shard = IndexedShard(path.name, status.st_size, status.st_mtime_ns, count, len(names))
    return ShardContent(shard, bytes(records), bytes(names))


def write_index(path: Path, columns: Columns, contents: Sequence[ShardContent], fingerprint: str | None) -> None:
    """Whole or not at all.

    Args:
        path: of the index.
        columns: those that were looked for.
        contents: of each shard.
        fingerprint: of all of them, None where some are still to come.

    Raises:
        OSError: it cannot be written.
    """
    digest = hashlib.sha256()
    for block in _blocks(contents):
        digest.update(block)
    shards = [content.shard for content in contents]
    description = json.dumps(asdict(Description(columns, shards, fingerprint, digest.hexdigest()))).encode()
    prefix = PREFIX.pack(MAGIC, version_of(columns), len(description), hashlib.sha256(description).digest())

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines((prefix, description))
            file.writelines(_blocks(contents))

    write_atomically(path, write)


def _blocks(contents: Sequence[ShardContent]) -> Iterator[bytes]:
    yield from (content.records for content in contents)
    yield from (content.keys for content in contents)


def _record(file: BinaryIO, columns: Columns, parts: Sequence[Member | None], key_begin: int, key_length: int) -> bytes:
    headers = (read_at(file.fileno(), part.offset - HEADER, HEADER) if part else b"" for part in parts)
    return record_of(len(columns)).pack(
        *(part.offset if part else 0 for part in parts),
        *(part.size if part else 0 for part in parts),
        *map(zlib.crc32, headers),
        *(column.index(part.extension) if part else ABSENT for part, column in zip(parts, columns, strict=True)),
        key_begin,
        key_length,
    )
