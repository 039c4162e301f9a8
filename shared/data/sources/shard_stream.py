"""WebDataset tars that can only be read from front to back: URLs, commands, compressed files."""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from shared.config import TrainConfig
from shared.data.addresses import PACKAGES, scheme_of
from shared.data.remote import RemoteError, RemoteStreams
from shared.data.sample import RawSample
from shared.data.sources.base import Manifest
from shared.data.sources.shard_keys import MOST_MEMBERS, ShardKeys, raw_sample, split_member, twice
from shared.data.sources.shuffling import buffered_shuffle
from shared.data.sources.tar_reading import Content, DamagedTarError, EndsTooEarlyError, StreamContent, regular_files
from shared.outgoing.redaction import redacted
from shared.randomness import Purpose, generator
from shared.untrusted import foreign_library, open_file, shown
from shared.untrusted.pictures import LARGEST_FILE
from shared.user_errors import UserError

_DRAIN_BYTES = 2**20


class ShardStream:
    """Streaming of undecoded samples, grouped as webdataset groups them, shards in a seeded order, through a shuffle
    buffer.

    Every host reads everything, so that what is at a position does not depend on the number of hosts: how many samples
    come before a position is only known by reading them, or from an index, with which no stream is needed.
    """

    def __init__(self, locations: list[str], keys: ShardKeys, config: TrainConfig) -> None:
        """Reads the first sample. UserError when there is none, or its keys cannot be told."""
        self._locations, self._keys = locations, keys
        self._seed, self._buffer_size = config.seed, config.shuffle_buffer_size
        self._max_samples = config.max_train_samples
        first = next(self._read(locations), None)
        where = shown(redacted(locations[0]))
        if first is None:
            raise UserError(f"{where} and its like hold no samples; expected members such as 0001.image.png")
        keys.check(first.members, where)
        self.manifest: Manifest = {
            "kind": "shard_stream",
            "location": [redacted(location) for location in locations],
            "samples": None,
            "fingerprint": None,
            "columns": keys.columns,
            "shuffle_buffer_size": config.shuffle_buffer_size,
            "max_train_samples": config.max_train_samples,
        }

    def iterate(self, epoch: int) -> Iterator[RawSample]:
        """The samples of one epoch. --max_train_samples takes the same first ones in every epoch."""
        if self._max_samples is not None:
            samples: Iterator[_StreamedSample] = itertools.islice(self._read(self._locations), self._max_samples)
        else:
            order = generator(self._seed, Purpose.SHARD_ORDER, epoch).permutation(len(self._locations))
            samples = self._read([self._locations[index] for index in order])
        return buffered_shuffle(map(self._raw_sample, samples), self._buffer_size, self._seed, epoch)

    def _read(self, locations: list[str]) -> Iterator["_StreamedSample"]:
        with RemoteStreams([location for location in locations if is_remote(location)]) as remote:
            for location in locations:
                try:
                    yield from _read_shard(location, remote, self._keys)
                except (OSError, DamagedTarError, RemoteError) as error:
                    # An OSError and its cause may quote the whole command, with a token in it.
                    reason = type(error).__name__ if isinstance(error, OSError) else str(error)
                    raise UserError(
                        f"--train_shards: reading {shown(redacted(location))} failed ({reason}). Check that it "
                        "exists, is a tar, and may be read from here."
                    ) from None

    def _raw_sample(self, sample: "_StreamedSample") -> RawSample:
        name, members = f"{redacted(sample.location)}:{sample.key}", sample.members
        if sample.defect:
            return RawSample(None, (), (), name, sample.defect)
        *pictures, caption = self._keys.find(members)
        named_caption = (caption, members[caption] or b"") if caption else None
        image, *conditions = (members[extension] if extension else None for extension in pictures)
        return raw_sample(name, image, conditions, named_caption)


@dataclass
class _StreamedSample:
    """Consecutive members of one key: by extension what they hold, None where it is not wanted."""

    location: str
    key: str
    members: dict[str, bytes | None] = field(default_factory=dict)
    defect: str = ""
    bytes: int = 0

    def add(self, extension: str, size: int, content: Content, keys: ShardKeys) -> None:
        self.members[extension] = None
        if not keys.wants(extension) or self.defect:
            return
        # Several members of a sample may be wanted until the best is known: together, too, they fit a picture's limit.
        self.defect = keys.too_large(extension, size) or _too_large_together(self.bytes + size)
        if not self.defect:
            self.members[extension] = content.read(size)
            self.bytes += size


def _read_shard(location: str, remote: RemoteStreams, keys: ShardKeys) -> Iterator[_StreamedSample]:
    if is_remote(location):
        yield from _samples(location, StreamContent(remote.next()), keys)
        return
    stream = _open(location)
    try:
        yield from _samples(location, StreamContent(stream), keys)
        while stream.read(_DRAIN_BYTES):
            pass
    except BaseException:  # the reader stopped early, or failed; either way the stream is to be closed
        with suppress(OSError):  # a command cut off in mid-output says so, which is no news here
            stream.close()
        raise
    stream.close()  # raises where the command failed, which may have shortened the tar without a trace


def _samples(location: str, content: Content, keys: ShardKeys) -> Iterator[_StreamedSample]:
    sample: _StreamedSample | None = None
    for name, size in regular_files(content):
        split = split_member(name)
        if split is None:
            continue
        key, extension = split
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = _StreamedSample(location, key)
        if extension in sample.members:
            raise twice(redacted(location), name)
        if len(sample.members) >= MOST_MEMBERS:
            raise DamagedTarError(f"a sample has more than {MOST_MEMBERS:,} members")
        try:
            sample.add(extension, size, content, keys)
        except EndsTooEarlyError:
            raise EndsTooEarlyError(f", in {shown(name)}") from None
    if sample is not None:
        yield sample


def _too_large_together(size: int) -> str:
    return f"its members have {size:,} bytes together, more than any honest sample" if size > LARGEST_FILE else ""


def is_local(location: str) -> bool:
    """Whether a location of shards is a path."""
    scheme, colon, _ = location.partition(":")
    return scheme == "file" or not colon or "/" in scheme


def is_remote(location: str) -> bool:
    """Whether a location of shards is an address that is read in ranges, with faults mended."""
    return scheme_of(location) in PACKAGES


def _open(location: str) -> Any:
    if is_local(location):
        return open_file(location)
    from webdataset.gopen import gopen

    try:
        with foreign_library("", ""):
            return gopen(location)
    except ValueError as error:  # the reason may quote the whole address
        raise DamagedTarError(type(error.__cause__).__name__) from None
