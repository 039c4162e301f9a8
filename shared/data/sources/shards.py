"""WebDataset tars on a local disk: an index, or else every header, is read once; then every sample is within reach."""

import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from shared.config import TrainConfig
from shared.data.sample import EncodedImage, RawSample
from shared.data.sources.base import Manifest, RandomAccessSource, StreamSource
from shared.data.sources.indexed_samples import beginning_of_image, find_index, fingerprint_of, read_sample
from shared.data.sources.remote_shards import open_remote_shards
from shared.data.sources.shard_keys import MOST_MEMBERS, ShardKeys, shard_keys, split_member, twice
from shared.data.sources.shard_layout import HEADER, IndexedSample, Member, Shard
from shared.data.sources.shard_locations import check_schemes, check_shell, expand
from shared.data.sources.shard_stream import ShardStream, is_local, is_remote
from shared.data.sources.tar_reading import DamagedTarError, FileContent, read_at, regular_files
from shared.outgoing.redaction import redacted
from shared.untrusted import open_file, shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz")


def open_shards(config: TrainConfig) -> RandomAccessSource | StreamSource:
    """The samples of --train_shards: random access when all are uncompressed and local, or remote with an index beside
    them; a stream otherwise.

    Raises:
        UserError: for shards that do not exist, URLs that run shell commands without --allow_shell_urls, files that
            are not tars, or keys that cannot be told.
    """
    locations = list(expand(config.train_shards or []))
    if not locations:
        raise UserError("--train_shards names no shards; give paths or URLs, e.g. data/train-{000000..000099}.tar")
    check_shell(locations, config.allow_shell_urls)
    check_schemes(locations)
    keys = shard_keys(config.shards_image_key, config.shards_conditioning_key, config.shards_caption_key)
    if all(is_local(location) and not location.endswith(COMPRESSED) for location in locations):
        return ShardSource([Path(location) for location in locations], keys)
    if all(is_remote(location) and not redacted(location).endswith(COMPRESSED) for location in locations):
        source = open_remote_shards(locations, keys)
        if source is not None:
            return source
        logger.warning(
            "No index lies beside the remote shards: they are read from front to back, and shuffled through a buffer. "
            "python3 -m shared.prepare_data index makes one"
        )
    return ShardStream(locations, keys, config)


class ShardSource:
    """Random access to the samples of local tars, through positioned reads."""

    def __init__(self, shards: list[Path], keys: ShardKeys) -> None:
        self._keys = keys
        self._samples, stored_fingerprint = _samples_in(shards, keys)
        if not self._samples:
            raise UserError(
                f"{shown(shards[0])} and its like hold no samples; expected WebDataset members such as 0001.image.png"
            )
        self.manifest: Manifest = {
            "kind": "shards",
            "location": [str(shard) for shard in shards],
            "samples": len(self._samples),
            "fingerprint": stored_fingerprint or fingerprint_of(self._samples),
            "columns": keys.columns,
        }

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> RawSample:
        return self._read(self._samples[index])

    def captions(self, index: int) -> tuple[str, ...]:
        """Without reading the images."""
        return self._read(replace(self._samples[index], image=None, conditioning_images=())).captions

    def header(self, index: int) -> EncodedImage | None:
        """See `header_at`."""
        beginning = beginning_of_image(self._samples[index])
        return None if beginning is None else self._read(beginning).picture

    def _read(self, sample: IndexedSample) -> RawSample:
        shard = sample.shard
        assert isinstance(shard, Path)

        def contents_of(parts: list[Member | None]) -> list[bytes | None]:
            # Opened per sample: thousands of shards would not fit a process's open files, and threads share nothing.
            with open_file(shard) as file:
                return [_read(shard, file.fileno(), part) for part in parts]

        return read_sample(sample, self._keys, contents_of)


def _samples_in(shards: list[Path], keys: ShardKeys) -> tuple[Sequence[IndexedSample], str | None]:
    """The samples, and their fingerprint where an index has it."""
    index = find_index(shards, keys)
    if index is None:
        return [sample for shard in shards for sample in index_shard(shard, keys)], None
    for shard in index.shards_that_begin_with_less():
        assert isinstance(shard, Path)
        next(index_shard(shard, keys))  # which refuses it, and says what there is
    return index, index.fingerprint


def index_shard(shard: Path, keys: ShardKeys) -> Iterator[IndexedSample]:
    """The samples of one tar, grouped as webdataset groups them: consecutive members of one key.

    UserError for a file that is no uncompressed tar, and for a first sample in which the keys cannot be told.
    """
    for number, (key, members) in enumerate(member_groups(shard, headers_of(shard))):
        if number == 0:
            keys.check(members, shown(shard))
        parts = [members[extension] if extension else None for extension in keys.find(members)]
        yield IndexedSample.of_parts(shard, key, parts)
    logger.debug("indexed %s", shard)


def member_groups(
    shard: Shard, headers: Iterable[tuple[str, int, int, int | None]]
) -> Iterator[tuple[str, dict[str, Member]]]:
    """The key of each sample of one tar, and its members by extension.

    Args:
        shard: for messages.
        headers: (name, offset of the content, size, CRC-32 of the header) of its regular files; see `Member`.

    Raises:
        UserError: a sample holds a member twice, or too many.
    """
    current, members = None, dict[str, Member]()
    for name, offset, size, crc in headers:
        split = split_member(name)
        if split is None:
            continue
        key, extension = split
        if key != current:
            if current is not None:
                yield current, members
            current, members = key, {}
        if extension in members:
            raise twice(shard, name)
        if len(members) >= MOST_MEMBERS:
            raise UserError(f"{shown(shard)} holds a sample of more than {MOST_MEMBERS:,} members; leave it out")
        members[extension] = Member(extension, offset, size, crc)
    if current is not None:
        yield current, members


def headers_of(shard: Path) -> Iterator[tuple[str, int, int, None]]:
    """(name, offset of the content, size, None) of every regular file in a local tar.

    UserError for a file that is no uncompressed tar.
    """
    with open_file(shard) as file:
        content = FileContent(file.fileno())
        try:
            for name, size in regular_files(content):
                yield name, content.position, size, None
        except DamagedTarError as error:
            raise UserError(
                f"{shown(shard)} cannot be read as an uncompressed tar: {error}; write it again or leave it out"
            ) from error


def _read(shard: Path, descriptor: int, member: Member | None) -> bytes | None:
    if member is None:
        return None
    try:
        if member.header is not None:
            _check_header(shard, descriptor, member.offset, member.header)
        content = read_at(descriptor, member.offset, member.size)
    except OSError as error:
        raise UserError(f"{shown(shard)} cannot be read: {error.strerror}.") from error
    if len(content) < member.size:
        raise UserError(f"{shown(shard)} has become shorter since it was opened. Leave it as it is while training.")
    return content


def _check_header(shard: Path, descriptor: int, offset: int, crc: int) -> None:
    if zlib.crc32(read_at(descriptor, offset - HEADER, HEADER)) != crc:
        raise UserError(
            f"{shown(shard)} has changed since it was indexed. Index it again (python3 -m shared.prepare_data index), "
            "or delete the index."
        )
