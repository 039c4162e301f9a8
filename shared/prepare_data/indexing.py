"""`index`: the index beside local shards, made from their headers."""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shared.data.conditions import numbered_conditions
from shared.data.sources.indexed_samples import IndexedSamples, indexes_in
from shared.data.sources.shard_index import SUFFIX, ShardIndex
from shared.data.sources.shard_index_writing import ShardContent, read_shard, write_index
from shared.data.sources.shard_keys import ShardKeys, shard_keys
from shared.data.sources.shard_locations import expand
from shared.data.sources.shard_stream import is_local
from shared.data.sources.shards import COMPRESSED, fingerprint_of
from shared.prepare_data.options import IndexOptions
from shared.prepare_data.parallel import in_order, threads_of
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_SAVED_EVERY = 60.0  # seconds: so much is read again after a kill


def run(options: IndexOptions, patterns: Sequence[str]) -> int:
    """An index in each folder of the shards."""
    keys = shard_keys(options.shards_image_key, options.shards_conditioning_key, options.shards_caption_key)
    by_folder: dict[Path, list[Path]] = {}
    for shard in _local_shards(patterns):
        by_folder.setdefault(shard.parent, []).append(shard)
    for shards in by_folder.values():
        index_shards(list(dict.fromkeys(shards)), keys, threads_of(options.num_workers))
    return 0


def index_shards(shards: Sequence[Path], keys: ShardKeys, threads: int) -> Path:
    """Write the index of shards of one folder, and say what is in it.

    Raises:
        UserError: a shard cannot be read, none holds a sample, or the index cannot be written.
    """
    path = shards[0].with_name(shards[0].name + SUFFIX)
    columns, contents, saved = keys.columns, list[ShardContent](), time.monotonic()
    try:
        with tqdm(total=len(shards), desc="index", unit="shard", dynamic_ncols=True) as bar:
            for content in _contents(shards, keys, threads):
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
        write_index(path, columns, contents, fingerprint_of(IndexedSamples(list(shards), places)))
    except OSError as error:
        raise UserError(
            f"{shown(path)} cannot be written: {error.strerror}. The index stands beside the shards: make their folder "
            "one that you may write to, and see that the disk is not full."
        ) from error
    _report(path, contents, len(columns))
    return path


def _local_shards(patterns: Sequence[str]) -> list[Path]:
    locations = list(expand(patterns, "SHARDS"))
    for location in locations:
        if not is_local(location) or location.endswith(COMPRESSED):
            raise UserError(
                f"{shown(location)!r} cannot be indexed: expected uncompressed tars on a local disk. Others are read "
                "from front to back, and need no index."
            )
    return [Path(location) for location in locations]


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
