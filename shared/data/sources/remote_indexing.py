"""An index's part of each of several remote shards, which are read from front to back, once."""

import zlib
from collections.abc import Iterator, Sequence

from shared.data.remote import RemoteError, RemoteStream, RemoteStreams
from shared.data.sources.shard_index_writing import ShardContent, records_of, shard_content
from shared.data.sources.shard_keys import ShardKeys
from shared.data.sources.shard_layout import Member, RemoteShard
from shared.data.sources.tar_reading import DamagedTarError, EndsTooEarlyError, regular_files
from shared.untrusted import MIB, shown
from shared.user_errors import UserError

_AT_ONCE = MIB


def read_remote_shards(addresses: Sequence[str], keys: ShardKeys) -> Iterator[ShardContent]:
    """In their order.

    Raises:
        UserError: one cannot be read, is no uncompressed tar, or lies where no ranges can be asked for; or as
            `records_of`.
    """
    with RemoteStreams(addresses) as streams:
        for shard in map(RemoteShard, addresses):
            try:
                yield _read_shard(shard, streams.next(), keys)
            except RemoteError as error:
                raise UserError(
                    f"{shown(shard)} cannot be read: {error}. Give shards that can be read from here."
                ) from None
            except DamagedTarError as error:
                raise UserError(
                    f"{shown(shard)} cannot be read as an uncompressed tar: {error}; write it again or leave it out"
                ) from None


def _read_shard(shard: RemoteShard, stream: RemoteStream, keys: ShardKeys) -> ShardContent:
    size = stream.size
    if size is None:
        raise RemoteError("its server does not answer with ranges, without which an index is of no use")
    records, names = records_of(shard, _headers(_Content(stream)), keys, _crc_of)
    return shard_content(shard, size, 0, keys, records, names)


def _headers(content: "_Content") -> Iterator[tuple[str, int, int, int]]:
    for name, size in regular_files(content):
        yield name, content.position, size, zlib.crc32(content.last)


def _crc_of(part: Member) -> int:
    assert part.header is not None
    return part.header


class _Content:
    """Of a stream, as it is."""

    def __init__(self, stream: RemoteStream) -> None:
        self.position = 0
        self.last = b""
        """What was read last: where a member's content begins, its header."""
        self._stream = stream

    def read(self, count: int) -> bytes:
        content = bytearray()
        while len(content) < count and (part := self._stream.read(count - len(content))):
            content += part
        self.position += len(content)
        self.last = bytes(content)
        return self.last

    def skip_to(self, position: int) -> None:
        while self.position < position:
            part = self._stream.read(min(position - self.position, _AT_ONCE))
            if not part:
                raise EndsTooEarlyError
            self.position += len(part)
