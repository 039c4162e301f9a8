"""`pack`: shards of any data, each of so many of the source's samples, whatever was done before and by how many.

`annotate` and `caption` pack too: samples whose condition or caption they make.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import webdataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from shared.config import TrainConfig
from shared.config.validation import check_output_dir
from shared.data.decoded_pairs import PairDecoder, conditioning_interpolation
from shared.data.sample import BadSampleError, RawSample, SkippedSamples
from shared.data.sources import RandomAccessSource, Source, open_source
from shared.data.sources.shard_keys import condition_members, shard_keys
from shared.prepare_data.indexing import index_shards
from shared.prepare_data.members import Members, Storing, members_of
from shared.prepare_data.numbered import NumberedSample, in_groups, numbered
from shared.prepare_data.options import PackingOptions, PackingPairsOptions, PackOptions
from shared.prepare_data.packed_folder import CARD, Done, LeftOut, PackedFolder
from shared.prepare_data.parallel import in_order, threads_of
from shared.run.folder import make_output_folder
from shared.run.lock import run_lock
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

CIRCLES_SIDE = 512  # pixels, without --resolution
_LONGEST_REASON = 1500  # characters: two paths, each already cut


Opened = TypeVar("Opened")

Packed = tuple[int, Members | LeftOut]
"""What becomes of the sample of a number."""

Packing = Callable[[Iterator[NumberedSample], int], Iterator[Packed]]
"""What becomes of some samples, in their order, of which so many threads read."""


def run(options: PackOptions) -> int:
    """Pack, or go on where an earlier call of it was."""
    path = output_folder(options)
    training = options.training(resolution=options.resolution or CIRCLES_SIDE)
    storing, settings = storing_of(options, training)
    packing = one_by_one(lambda number, sample: members_of(sample, storing))
    exit_code = pack(path, open_source(training), options, packing, settings, training.num_conditions)
    if storing.resized is not None:
        storing.resized.report()
    return exit_code


def storing_of(options: PackingPairsOptions, training: TrainConfig) -> tuple[Storing, dict[str, Any]]:
    """How pairs are stored, and what of that decides the members beside the options of whatever packs."""
    if options.resolution is None:
        return Storing(None, options.jpeg_quality), {}
    settings = {
        "conditioning_interpolation": conditioning_interpolation(training),
        "mismatched_pairs": options.mismatched_pairs,
    }
    return Storing(PairDecoder(training), options.jpeg_quality), settings


def output_folder(options: PackingOptions) -> Path:
    """--output_dir. UserError where it is not given, or is no folder of this machine."""
    if options.output_dir is None:
        raise UserError("--output_dir is missing: name the folder for the shards.")
    check_output_dir(options.output_dir)
    return Path(options.output_dir)


def one_by_one(members: Callable[[int, RawSample], Members]) -> Packing:
    """Packing of samples that have nothing to do with each other.

    Args:
        members: of a sample and its number, from several threads; it raises BadSampleError where that cannot be used.
    """
    return partial(_opened, members)


def in_batches(
    open_sample: Callable[[int, RawSample], Opened], finish: Callable[[Sequence[Opened]], Sequence[Members]], rows: int
) -> Packing:
    """Packing of samples that a model sees several of at once.

    Args:
        open_sample: as `members` of `one_by_one`, what `finish` needs of a sample.
        finish: the members of samples, from one thread; never of none.
        rows: how many samples at once, the bad ones among them. Always the same ones, so that what is interrupted and
            taken up again is the same to the last bit.
    """

    def packed(samples: Iterator[NumberedSample], threads: int) -> Iterator[Packed]:
        opened = _opened(open_sample, samples, threads)
        while some := list(itertools.islice(opened, rows)):
            usable = [content for _, content in some if not isinstance(content, LeftOut)]
            finished = iter(finish(usable) if usable else ())
            for number, content in some:
                yield number, content if isinstance(content, LeftOut) else next(finished)

    return packed


def pack(
    path: Path,
    source: Source,
    options: PackingOptions,
    packing: Packing,
    settings: Mapping[str, Any],
    conditions: int = 1,
) -> int:
    """Write shards of a source's samples, or go on with them.

    Args:
        path: of their folder, which is made.
        source: all of its samples are packed.
        options: how.
        packing: what makes members of samples.
        settings: what decides the members beside the source and the options.
        conditions: how many a sample has.

    Raises:
        UserError: the folder holds something else or cannot be written to, too many samples are bad, or all.
    """
    make_output_folder(path)
    with run_lock(path), logging_redirect_tqdm():
        folder = PackedFolder(path, _settings(options, source) | json.loads(json.dumps(settings)))
        if folder.is_finished:
            logger.info("%s holds these shards already; there is nothing left to do", shown(path))
            return 0
        shards = _pack(options, source, folder, packing)
        _check_some(source, shards)
        threads = threads_of(options.num_workers)
        keys = shard_keys(None, condition_members(conditions) if conditions > 1 else None, None)
        index_shards([folder.shard(number) for number in range(len(shards))], keys, threads)
        folder.finish(shards)
    logger.info(
        "%s: %s samples in %s shards; %s were left out, see %s",
        shown(path),
        f"{sum(done.samples for done in shards):,}",
        f"{len(shards):,}",
        f"{sum(len(done.left_out) for done in shards):,}",
        CARD,
    )
    if conditions > 1:
        names = " ".join(condition_members(conditions))
        logger.info("Its conditions are found with --shards_conditioning_key %s", names)
    return 0


def _settings(options: PackingOptions, source: Source) -> dict[str, Any]:
    """What decides the bytes of the shards, and nothing of where they come from or go to."""
    data = {name: value for name, value in source.manifest.items() if name != "location"}
    resized = options.resolution is not None
    settings = {
        "data": data,
        "samples_per_shard": options.samples_per_shard,
        "resolution": options.resolution,
        "image_interpolation_mode": options.image_interpolation_mode if resized else None,
        "jpeg_quality": options.jpeg_quality,
    }
    return json.loads(json.dumps(settings))


def _pack(options: PackingOptions, source: Source, folder: PackedFolder, packing: Packing) -> list[Done]:
    threads, skipped = threads_of(options.num_workers), SkippedSamples(options.max_skipped_samples)
    total = len(source) if isinstance(source, RandomAccessSource) else None
    shards: list[Done] = []
    with tqdm(total=total, desc="pack", unit="sample", dynamic_ncols=True) as bar:
        for number, group in enumerate(in_groups(numbered(source), options.samples_per_shard)):
            done = folder.done(number)
            if done is not None:
                for left_out in done.left_out:
                    skipped.add(left_out.sample, BadSampleError(left_out.reason))
                bar.update(done.samples + len(done.left_out))
            else:
                packed = _progressing(bar, packing(group, threads))
                done = folder.write_shard(number, partial(_write, packed, skipped))
            shards.append(done)
    return shards


def _opened(
    open_sample: Callable[[int, RawSample], Opened], samples: Iterator[NumberedSample], threads: int
) -> Iterator[tuple[int, Opened | LeftOut]]:
    return in_order(partial(_opened_one, open_sample), samples, threads)


def _opened_one(
    open_sample: Callable[[int, RawSample], Opened], sample: NumberedSample
) -> tuple[int, Opened | LeftOut]:
    number, read = sample
    raw = read()
    try:
        return number, open_sample(number, raw)
    except BadSampleError as error:
        return number, LeftOut(shown(raw.name), shown(error, _LONGEST_REASON))


def _write(packed: Iterator[Packed], skipped: SkippedSamples, path: Path) -> Done:
    samples, left_out = 0, list[LeftOut]()
    # Without a time in it, the same samples make the same bytes.
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for number, content in packed:
            if isinstance(content, LeftOut):
                left_out.append(content)
                skipped.add(content.sample, BadSampleError(content.reason))
                continue
            writer.write({"__key__": f"{number:09d}"} | content)
            samples += 1
    return Done(samples, left_out)


def _progressing(bar: "tqdm[Any]", packed: Iterator[Packed]) -> Iterator[Packed]:
    for one in packed:
        bar.update()
        yield one


def _check_some(source: Source, shards: list[Done]) -> None:
    if not sum(done.samples for done in shards):
        raise UserError(f"{shown(source.manifest.get('location'))} holds no sample that can be used.")
