"""WebDataset tars that can only be read from front to back: URLs, commands, compressed files."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.config import TrainConfig
from shared.data.addresses import PACKAGES, scheme_of
from shared.data.remote import Readers, RemoteError, RemoteStreams
from shared.data.sample import RawSample
from shared.data.sources.base import Manifest, StreamSource
from shared.data.sources.shard_keys import MOST_MEMBERS, ShardKeys, raw_sample, split_member, twice
from shared.data.sources.shuffling import buffered_shuffle
from shared.data.sources.tar_reading import Content, DamagedTarError, EndsTooEarlyError, StreamContent, regular_files
from shared.outgoing.redaction import redacted
from shared.randomness import Purpose, generator
from shared.untrusted import foreign_library, open_file, shown
from shared.untrusted.pictures import LARGEST_FILE
from shared.user_errors import UserError

MOST_LANES = 64
"""As many hosts read different shards; more would make ranges small on a single one."""

_ORDERS_HELD = 4  # of epochs: lanes are at the ends of two, seldom of more
_DRAIN_BYTES = 2**20


class ShardStream:
    """Streaming of undecoded samples, grouped as webdataset groups them, shards in a seeded order, through a shuffle
    buffer.

    How many samples come before a position is only known by reading them, so whoever wants one reads all that come
    before it. What is remote is divided into lanes, of which hosts read different ones; the order depends on how many
    lanes there are, and not on who reads them. The rest is read whole by every host.
    """

    def __init__(self, locations: list[str], keys: ShardKeys, config: TrainConfig) -> None:
        """Reads the first sample. UserError when there is none, or its keys cannot be told."""
        self._locations, self._keys = locations, keys
        self._seed, self._buffer_size = config.seed, config.shuffle_buffer_size
        self._max_samples = config.max_train_samples
        self._order = lru_cache(maxsize=_ORDERS_HELD)(self._order_of)
        first = next(self._read(locations, Readers(MOST_LANES)), None)
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
        if self.most_lanes > 1:
            self.manifest["most_lanes"] = self.most_lanes

    @property
    def most_lanes(self) -> int:
        """See `StreamsInLanes`. The first --max_train_samples are in the first shards, whichever those have."""
        divisible = self._max_samples is None and all(map(is_remote, self._locations))
        return min(MOST_LANES, len(self._locations)) if divisible else 1

    def lanes(self, count: int, wanted: Sequence[int]) -> dict[int, StreamSource]:
        """See `StreamsInLanes`."""
        readers = Readers(len(wanted))
        return {number: _Lane(self, number, count, readers) for number in wanted}

    def iterate(self, epoch: int) -> Iterator[RawSample]:
        """The samples of one epoch. --max_train_samples takes the same first ones in every epoch."""
        if self._max_samples is None:
            return self.iterate_lane(0, 1, epoch, Readers())
        samples = itertools.islice(self._read(self._locations, Readers()), self._max_samples)
        return buffered_shuffle(map(self._raw_sample, samples), self._buffer_size, self._seed, epoch)

    def iterate_lane(self, number: int, count: int, turn: int, readers: Readers) -> Iterator[RawSample]:
        """One of `count` lanes, for as many shards as there are in all.

        The shards of all epochs, one epoch's order after the other's, are dealt to the lanes one by one.
        """
        shards = len(self._locations)
        places = range(turn * shards * count + number, (turn + 1) * shards * count, count)
        samples = self._read(map(self._location_at, places), readers)
        buffer_size = max(1, self._buffer_size // count)
        return buffered_shuffle(map(self._raw_sample, samples), buffer_size, self._seed, turn * count + number)

    def _location_at(self, place: int) -> str:
        epoch, offset = divmod(place, len(self._locations))
        return self._locations[self._order(epoch)[offset]]

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        return generator(self._seed, Purpose.SHARD_ORDER, epoch).permutation(len(self._locations))

    def _read(self, locations: Iterable[str], readers: Readers) -> Iterator["_StreamedSample"]:
        locations, ahead = itertools.tee(locations)
        with RemoteStreams(filter(is_remote, ahead), readers) as remote:
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


class _Lane:
    """One of a stream's, as a stream whose epochs are `iterate_lane`'s turns."""

    def __init__(self, stream: ShardStream, number: int, count: int, readers: Readers) -> None:
        self.manifest = stream.manifest
        self._stream, self._number, self._count, self._readers = stream, number, count, readers

    def iterate(self, epoch: int) -> Iterator[RawSample]:
        return self._stream.iterate_lane(self._number, self._count, epoch, self._readers)


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
