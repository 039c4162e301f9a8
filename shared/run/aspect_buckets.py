"""`--aspect_buckets`: a run's pictures put into buckets before its first step."""

import logging
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.data.buckets.kept_sizes import KEPT_SIZES, keep_sizes, read_kept_sizes
from shared.data.buckets.picture_sizes import picture_sizes
from shared.data.buckets.shapes import choose_buckets
from shared.data.buckets.source import BucketedSource
from shared.data.sources import RandomAccessSource, Source
from shared.precomputed_text.precomputing import ALONE, Processes
from shared.run.setup import PreparedRun, batch_spec
from shared.untrusted import shown
from shared.untrusted.border import reason
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_THREADS = 16  # which mostly wait for a disk


def with_aspect_buckets(prepared: PreparedRun, devices: int, processes: Processes = ALONE) -> PreparedRun:
    """With `--aspect_buckets` the run whose samples are in buckets, without it the run as it is.

    Args:
        devices: over all hosts. A bucket holds as many samples as they take in a step, or more.
        processes: those that share a run's folder. One of them looks at the pictures.

    Raises:
        UserError: the data cannot be read any further.
    """
    config, source = prepared.config, prepared.source
    if config.aspect_buckets is None:
        return prepared
    assert isinstance(source, RandomAccessSource), "others are refused where they are opened"
    sizes_N2 = _sizes(prepared.output_dir, source, processes)
    unknown = int((sizes_N2 <= 0).any(axis=1).sum())
    if unknown:
        logger.warning(
            "%d of %d pictures do not tell their sizes. They are put where most pictures are, and what is wrong with "
            "them is told when their turn comes",
            *(unknown, len(sizes_N2)),
        )
    least = batch_spec(config, devices).global_batch_size
    buckets = choose_buckets(sizes_N2, config.resolution, config.aspect_buckets, least)
    return replace(prepared, source=BucketedSource(source, buckets))


def digest_of_buckets(source: Source) -> int | None:
    """Of which picture is in which bucket, 31 bits; None where there are none."""
    if not isinstance(source, BucketedSource):
        return None
    digest = 0
    for bucket in source.buckets:
        digest = zlib.crc32(bucket.members_K.astype("<i8").tobytes(), zlib.crc32(repr(bucket.size).encode(), digest))
    return digest & 0x7FFFFFFF


def check_same_buckets(digests: Sequence[int | None]) -> None:
    """Of every process: their parts of a batch have to be of one shape.

    Raises:
        UserError: one has put a picture into another bucket.
    """
    if len(set(digests)) > 1:
        raise UserError(
            "The hosts of this run found pictures of different sizes, so one of them could not read a picture or has "
            f"other data. Delete {KEPT_SIZES} in --output_dir on every host, and start the run again."
        )


def _sizes(folder: Path, source: RandomAccessSource, processes: Processes) -> npt.NDArray[np.int32]:
    if processes.index == 0:
        sizes_N2 = _kept_or_made(folder, source)
        processes.wait()
    else:
        processes.wait()
        sizes_N2 = _kept_or_made(folder, source)
    return sizes_N2


def _kept_or_made(folder: Path, source: RandomAccessSource) -> npt.NDArray[np.int32]:
    kept = read_kept_sizes(folder, source.manifest, len(source))
    if kept is not None:
        return kept
    sizes_N2 = picture_sizes(source, _THREADS)
    try:
        keep_sizes(folder, source.manifest, sizes_N2)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s), so a run that goes on from here looks at all pictures again",
            *(shown(folder / KEPT_SIZES), reason(error)),
        )
    return sizes_N2
