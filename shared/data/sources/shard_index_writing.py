"""Making the index of a shard from its headers, and writing one of many shards. `shard_index` tells the format."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
from shared.data.sources.shard_layout import HEADER, Member, Shard
from shared.data.sources.shards import headers_of, member_groups
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
    with open_file(path) as file:
        status = os.fstat(file.fileno())

        def crc_of(part: Member) -> int:
            return zlib.crc32(read_at(file.fileno(), part.offset - HEADER, HEADER))

        try:
            records, names = records_of(path, headers_of(path), keys, crc_of)
        except OSError as error:
            raise UserError(f"{shown(path)} cannot be read: {error.strerror}.") from error
    return shard_content(path, status.st_size, status.st_mtime_ns, keys, records, names)


def records_of(
    shard: Shard,
    headers: Iterable[tuple[str, int, int, int | None]],
    keys: ShardKeys,
    crc_of: Callable[[Member], int],
) -> tuple[bytes, bytes]:
    """The records and the keys of a shard's samples.

    Args:
        shard: which it is.
        headers: as `member_groups` takes them.
        keys: what its parts are called.
        crc_of: of the header of a part.

    Raises:
        UserError: its first sample has no image, or a sample is larger than any honest one.
    """
    records, names, columns = bytearray(), bytearray(), keys.columns
    for number, (key, members) in enumerate(member_groups(shard, headers)):
        found = keys.find(members)
        if number == 0 and found[0] is None:
            keys.check(members, shown(shard))
        parts = [members[extension] if extension else None for extension in found]
        name = key.encode("utf-8", "surrogateescape")
        if len(name) > _LONGEST_KEY or any(part and part.size > _LARGEST_MEMBER for part in parts):
            raise UserError(f"{shown(shard)} holds a sample larger than any honest one, {shown(key)}; leave it out")
        records += _record(crc_of, columns, parts, len(names), len(name))
        names += name
    return bytes(records), bytes(names)


def shard_content(
    shard: Shard, size: int, modified: int, keys: ShardKeys, records: bytes, names: bytes
) -> ShardContent:
    """What an index has of a shard; `modified` is 0 where no file system tells."""
    count = len(records) // record_of(len(keys.columns)).size
    return ShardContent(IndexedShard(shard.name, size, modified, count, len(names)), records, names)


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


def _record(
    crc_of: Callable[[Member], int],
    columns: Columns,
    parts: Sequence[Member | None],
    key_begin: int,
    key_length: int,
) -> bytes:
    return record_of(len(columns)).pack(
        *(part.offset if part else 0 for part in parts),
        *(part.size if part else 0 for part in parts),
        *(crc_of(part) if part else 0 for part in parts),
        *(column.index(part.extension) if part else ABSENT for part, column in zip(parts, columns, strict=True)),
        key_begin,
        key_length,
    )
