"""WebDataset tars at addresses, with an index: every sample is within reach, by one request."""

import logging
import tempfile
import threading
import weakref
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

from shared.data.remote import AbsentError, Identity, RemoteError, RemoteObject, open_object
from shared.data.sample import EncodedImage, RawSample
from shared.data.sources.base import Manifest
from shared.data.sources.indexed_samples import IndexedSamples, beginning_of_image, fingerprint_of, read_sample
from shared.data.sources.shard_index import MAGIC, SUFFIX, ShardIndex
from shared.data.sources.shard_keys import ShardKeys
from shared.data.sources.shard_layout import HEADER, IndexedSample, Member, RemoteShard
from shared.data.workers import Workers
from shared.untrusted import MIB, shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_READERS = 32  # samples on their way: at 100 ms each, 320 arrive in a second
_MOST_AHEAD = 4096  # samples that are on their way or wait; three batches are announced
_GAP = MIB  # bytes that nobody asked for, which cost less than another request
_AT_ONCE = 8 * MIB  # of an index
_LARGEST_INDEX = 64 * 1024 * MIB  # that of a thousand million samples


class RemoteShardSource:
    """Random access to the samples of tars at addresses that are in an index. No more is read than is asked for."""

    def __init__(self, shards: Sequence[RemoteShard], samples: IndexedSamples, keys: ShardKeys) -> None:
        """UserError where a shard's first sample lacks a part."""
        self._samples, self._keys = samples, keys
        if (lacking := next(samples.shards_that_begin_with_less(), None)) is not None:
            raise UserError(
                f"the first sample of {shown(lacking)} has no image, condition or caption under the usual names; set "
                "--shards_image_key, --shards_conditioning_key and --shards_caption_key, and index the shards with them"
            )
        self._pending: dict[int, Future[RawSample]] = {}
        self._lock = threading.Lock()
        self._readers = Workers(_READERS)
        weakref.finalize(self, self._readers.close)
        self.manifest: Manifest = {
            "kind": "shards",
            "location": [str(shard) for shard in shards],
            "samples": len(samples),
            "fingerprint": samples.fingerprint or fingerprint_of(samples),
            "columns": keys.columns,
        }

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> RawSample:
        with self._lock:
            pending = self._pending.pop(index, None)
        return _read(self._samples[index], self._keys) if pending is None else pending.result()

    def read_ahead(self, index: int) -> None:
        """Begin to read a sample that will be asked for."""
        with self._lock:
            if index in self._pending:
                return
            if len(self._pending) >= _MOST_AHEAD:  # whoever announced the oldest has been closed since
                self._pending.pop(next(iter(self._pending))).cancel()
            reading = partial(_read, self._samples[index], self._keys)
            self._pending[index] = self._readers.submit(reading)

    def captions(self, index: int) -> tuple[str, ...]:
        """Without reading the images."""
        return _read(replace(self._samples[index], image=None, conditioning_images=()), self._keys).captions

    def header(self, index: int) -> EncodedImage | None:
        """See `header_at`."""
        beginning = beginning_of_image(self._samples[index])
        return None if beginning is None else _read(beginning, self._keys).picture


def open_remote_shards(addresses: Sequence[str], keys: ShardKeys) -> RemoteShardSource | None:
    """The shards by the index that lies beside the first of them; None where none lies there, or not of all of them.

    Raises:
        UserError: the index is damaged, or cannot be read though it is there: other hosts might read it, and see the
            samples in another order.
    """
    index = _fetched_index(addresses[0])
    if index is None:
        return None
    if index.description.columns != keys.columns:
        logger.warning("%s is not used: it was made with other --shards_…_key", shown(index.name))
        return None
    numbers = {shard.name: number for number, shard in enumerate(index.description.shards)}
    shards = [RemoteShard(address) for address in addresses]
    missing = next((s for s in shards if s.folder != shards[0].folder or s.name not in numbers), None)
    if missing is not None:
        logger.warning("%s is not used: %s is not in it", shown(index.name), shown(missing))
        return None
    index.check_contents()
    places = [numbers[shard.name] for shard in shards]
    shards = [
        replace(shard, size=index.description.shards[place].size) for shard, place in zip(shards, places, strict=True)
    ]
    samples = IndexedSamples(shards, [(index, place) for place in places])
    if not len(samples):
        raise UserError(f"{shown(index.name)} knows no samples; index the shards again")
    return RemoteShardSource(shards, samples, keys)


def _fetched_index(first: str) -> ShardIndex | None:
    """The index beside the first shard, None where there is none."""
    path, question, query = first.partition("?")
    address = f"{path}{SUFFIX}{question}{query}"
    named = str(RemoteShard(address))
    try:
        opened = open_object(address, _AT_ONCE)
        if opened is None or not opened.beginning.startswith(MAGIC):  # a server may have a page for what it has not
            return None
        return _copied(opened, named)
    except AbsentError:
        return None
    except RemoteError as error:
        raise UserError(
            f"--train_shards: looking for {shown(named)} failed ({error}). Check that the shards exist and may be read "
            "from here."
        ) from None
    except OSError as error:
        raise UserError(
            f"the index {shown(named)} cannot be copied to {tempfile.gettempdir()}: {error.strerror}. Make room there, "
            "or name another folder by TMPDIR."
        ) from error


def _copied(opened: RemoteObject, named: str) -> ShardIndex:
    """Of a file without a name, which is gone with the process."""
    if opened.size > _LARGEST_INDEX:
        raise RemoteError(f"it claims {opened.size:,} bytes, more than any honest one")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index")
        with path.open("wb") as file:
            file.write(opened.beginning)
            for begin in range(len(opened.beginning), opened.size, _AT_ONCE):
                file.write(opened.read(begin, min(begin + _AT_ONCE, opened.size)))
        opened.check_unchanged()
        return ShardIndex(path, named)


def _read(sample: IndexedSample, keys: ShardKeys) -> RawSample:
    shard = sample.shard
    assert isinstance(shard, RemoteShard)
    assert shard.size is not None
    opened = RemoteObject(shard.address, Identity(shard.size, None))
    try:
        return read_sample(sample, keys, partial(_contents, opened))
    except RemoteError as error:
        raise UserError(
            f"{shown(shard)} cannot be read: {error}. If it has changed, index it again (python3 -m "
            "shared.prepare_data index), or delete the index."
        ) from None


def _contents(opened: RemoteObject, parts: list[Member | None]) -> list[bytes | None]:
    present = [part for part in parts if part is not None]
    if not present:
        return [None] * len(parts)
    begin, end = min(part.offset for part in present) - HEADER, max(part.offset + part.size for part in present)
    if end - begin <= sum(HEADER + part.size for part in present) + _GAP:
        span = opened.read(begin, end)
        return [_content(span, begin, part) if part else None for part in parts]
    return [_content_alone(opened, part) if part else None for part in parts]


def _content_alone(opened: RemoteObject, part: Member) -> bytes:
    begin = part.offset - HEADER
    return _content(opened.read(begin, part.offset + part.size), begin, part)


def _content(span: bytearray, begin: int, part: Member) -> bytes:
    offset = part.offset - begin
    if zlib.crc32(memoryview(span)[offset - HEADER : offset]) != part.header:
        raise RemoteError("it has changed since it was indexed")
    return bytes(memoryview(span)[offset : offset + part.size])
