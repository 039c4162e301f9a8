"""`index`: the index of shards, made from their headers: beside local ones, of remote ones in a file."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shared.data.conditions import numbered_conditions
from shared.data.sources.indexed_samples import IndexedSamples, fingerprint_of, indexes_in
from shared.data.sources.remote_indexing import read_remote_shards
from shared.data.sources.shard_index import SUFFIX, Columns, ShardIndex
from shared.data.sources.shard_index_writing import ShardContent, read_shard, write_index
from shared.data.sources.shard_keys import ShardKeys, shard_keys
from shared.data.sources.shard_layout import RemoteShard, Shard
from shared.data.sources.shard_locations import expand
from shared.data.sources.shard_stream import is_local, is_remote
from shared.data.sources.shards import COMPRESSED
from shared.outgoing.redaction import redacted
from shared.prepare_data.options import IndexOptions
from shared.prepare_data.parallel import in_order, threads_of
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_SAVED_EVERY = 60.0  # seconds: so much is read again after a kill


def run(options: IndexOptions, patterns: Sequence[str]) -> int:
    """An index in each folder of local shards, or one of remote shards."""
    keys = shard_keys(options.shards_image_key, options.shards_conditioning_key, options.shards_caption_key)
    locations = list(dict.fromkeys(_indexable(patterns)))
    if all(map(is_remote, locations)):
        _index_remote_shards(locations, keys, options.output_file)
        return 0
    if options.output_file is not None:
        raise UserError(
            "--output_file is about remote shards; the index of local ones stands beside them. Leave it out."
        )
    by_folder: dict[Path, list[Path]] = {}
    for shard in map(Path, locations):
        by_folder.setdefault(shard.parent, []).append(shard)
    for shards in by_folder.values():
        index_shards(shards, keys, threads_of(options.num_workers))
    return 0


def index_shards(shards: Sequence[Path], keys: ShardKeys, threads: int) -> Path:
    """Write the index of shards of one folder, and say what is in it.

    Raises:
        UserError: a shard cannot be read, none holds a sample, or the index cannot be written.
    """
    path = shards[0].with_name(shards[0].name + SUFFIX)
    _write(path, keys.columns, shards, _contents(shards, keys, threads))
    return path


def _index_remote_shards(addresses: Sequence[str], keys: ShardKeys, output_file: str | None) -> None:
    shards = [RemoteShard(address) for address in addresses]
    name = shards[0].name + SUFFIX
    if len({shard.folder for shard in shards}) > 1:
        raise UserError("the shards lie in several folders; index those of each by themselves")
    if output_file is None:
        raise UserError(f"remote shards need --output_file, where their index is written to: --output_file {name}")
    path = Path(output_file)
    _write(path, keys.columns, shards, read_remote_shards(addresses, keys))
    logger.info("copy it to the shards, as %s, where trainings look for it", shown(f"{shards[0]}{SUFFIX}"))


def _write(path: Path, columns: Columns, shards: Sequence[Shard], read: Iterable[ShardContent]) -> None:
    contents, saved = list[ShardContent](), time.monotonic()
    try:
        with tqdm(total=len(shards), desc="index", unit="shard", dynamic_ncols=True) as bar:
            for content in read:
                contents.append(content)
                bar.update()
                if time.monotonic() - saved > _SAVED_EVERY:
                    write_index(path, columns, contents, None)
                    saved = time.monotonic()
        samples = sum(content.shard.samples for content in contents)
        if not samples:
            raise UserError(f"{shown(shards[0])} and its like hold no samples; expected members such as 0001.jpg")
        write_index(path, columns, contents, None)
        index = ShardIndex(path)
        places = [(index, number) for number in range(len(shards))]
        write_index(path, columns, contents, fingerprint_of(IndexedSamples(shards, places)))
    except OSError as error:
        raise UserError(
            f"{shown(path)} cannot be written: {error.strerror}. The index of local shards stands beside them: make "
            "their folder one that you may write to, and see that the disk is not full."
        ) from error
    _report(path, contents, len(columns))


def _indexable(patterns: Sequence[str]) -> list[str]:
    locations = list(expand(patterns, "SHARDS"))
    for location in locations:
        if not (is_local(location) or is_remote(location)) or redacted(location).endswith(COMPRESSED):
            raise UserError(
                f"{shown(redacted(location))!r} cannot be indexed: expected uncompressed tars, on a local disk or at "
                "addresses. Others are read from front to back, and need no index."
            )
    if any(map(is_remote, locations)) and any(map(is_local, locations)):
        raise UserError("some of the shards are local and some remote: index each kind by itself")
    return locations


def _contents(shards: Sequence[Path], keys: ShardKeys, threads: int) -> Iterator[ShardContent]:
    """In the order of the shards; what an earlier index knows is taken from it."""
    known = _known(shards[0].parent, keys)

    def content_of(shard: Path) -> ShardContent:
        return _unchanged(shard, known) or read_shard(shard, keys)

    return in_order(content_of, shards, threads)


def _known(folder: Path, keys: ShardKeys) -> dict[str, tuple[ShardIndex, int]]:
    known: dict[str, tuple[ShardIndex, int]] = {}
    for path in indexes_in(folder):
        try:
            index = ShardIndex(path)
            index.check_contents()
        except UserError as error:
            logger.warning("%s", error)
            continue
        if index.description.columns == keys.columns:
            known |= {shard.name: (index, number) for number, shard in enumerate(index.description.shards)}
    return known


def _unchanged(shard: Path, known: dict[str, tuple[ShardIndex, int]]) -> ShardContent | None:
    if shard.name not in known:
        return None
    index, number = known[shard.name]
    indexed = index.description.shards[number]
    try:
        status = shard.stat()
    except OSError:  # whoever reads it says so
        return None
    if (status.st_size, status.st_mtime_ns) != (indexed.size, indexed.modified):
        return None
    return ShardContent(indexed, *index.content_of(number))


def _report(path: Path, contents: Sequence[ShardContent], parts: int) -> None:
    samples = sum(content.shard.samples for content in contents)
    logger.info("%s: %s samples in %s shards", shown(path), f"{samples:,}", f"{len(contents):,}")
    lacking = np.sum([content.lacking(parts) for content in contents], axis=0)
    for part, count in zip(("image", *numbered_conditions(parts - 2), "caption"), lacking, strict=True):
        if count:
            logger.warning("%s of them have no %s", f"{count:,}", part)
