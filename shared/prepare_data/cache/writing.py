"""Samples → the shards of a cache: each appears whole, and is kept when the work is taken up again.

Axes: B images encoded at once, R resolution, H W C of the latents.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import webdataset
from tqdm import tqdm

from shared.config import TrainConfig
from shared.data.cache_record import CacheRecord
from shared.data.cached_latents import Latents, pack
from shared.data.conditions import conditions_in
from shared.data.decoded_pairs import DecodedPair, PairDecoder
from shared.data.sample import BadSampleError, SkippedSamples
from shared.data.sources.base import RandomAccessSource
from shared.data.sources.cached import CAPTIONS, LATENTS
from shared.data.sources.shard_keys import condition_members
from shared.outgoing.atomic_files import write_atomically
from shared.prepare_data.cache.encoders import ImageEncoder
from shared.prepare_data.members import png
from shared.prepare_data.parallel import in_order, threads_of
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 1000  # what is lost at most when the work is stopped; some 100 MB at 512 px


class _Sample(NamedTuple):
    """One that can be used, decoded; its place in the data is its key."""

    place: int
    pair: DecodedPair
    captions: tuple[str, ...]


def write_shards(
    folder: Path,
    source: RandomAccessSource,
    config: TrainConfig,
    record: CacheRecord,
    open_encoder: Callable[[], ImageEncoder],
) -> int:
    """Encode all images of a source that are not in the folder's shards yet. Returns how many samples were bad.

    Args:
        open_encoder: called where something is to be encoded.

    Raises:
        UserError: more are bad than `max_skipped_samples` allows, or the disk is full.
    """
    starts = [start for start in range(0, len(source), SAMPLES_PER_SHARD) if not shard_path(folder, start).is_file()]
    if not starts:
        return 0
    encoder, decode, skipped = open_encoder(), PairDecoder(config), SkippedSamples(config.max_skipped_samples)
    threads = threads_of(config.dataloader_num_workers)

    def read(place: int) -> _Sample | None:
        sample = source[place]
        try:
            return _Sample(place, decode(sample), sample.captions)
        except BadSampleError as error:
            skipped.add(sample.name, error)
            return None

    count = sum(min(SAMPLES_PER_SHARD, len(source) - start) for start in starts)
    with tqdm(total=count, desc="VAE", unit="image", disable=not logger.isEnabledFor(logging.INFO)) as progress:
        for start in starts:
            places = range(start, min(start + SAMPLES_PER_SHARD, len(source)))
            samples = _usable(in_order(read, places, threads), progress)
            path = shard_path(folder, start)
            try:
                write_atomically(path, partial(_write, samples=samples, record=record, encoder=encoder))
            except OSError as error:
                raise UserError(
                    f"{shown(path)} cannot be written ({error.strerror}). If the disk is full, free some room and "
                    "start again: what is written so far is kept."
                ) from error
    decode.report()
    return len(skipped)


def shard_path(folder: Path, start: int) -> Path:
    """The shard of the samples from the one at `start` on."""
    return folder / f"cache-{start // SAMPLES_PER_SHARD:06d}.tar"


def _usable(samples: Iterator[_Sample | None], progress: "tqdm[Any]") -> Iterator[_Sample]:
    for sample in samples:
        progress.update()
        if sample is not None:
            yield sample


def _write(temporary: Path, *, samples: Iterator[_Sample], record: CacheRecord, encoder: ImageEncoder) -> None:
    # A fixed time and owner: what is made again is the same file.
    with temporary.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0) as tar:
        while some := list(itertools.islice(samples, encoder.rows)):
            # Always as many rows, so that one compiled program does; the last one counts once.
            pixels_BRR3 = np.stack([_pixels(sample) for sample in some + some[-1:] * (encoder.rows - len(some))])
            for sample, mean_HWC, std_HWC in zip(some, *encoder.encode(pixels_BRR3), strict=False):
                latents = Latents(mean_HWC, std_HWC, sample.pair.sizes)
                tar.write(
                    {
                        "__key__": f"{sample.place:09d}",
                        LATENTS: pack(latents, record.layout),
                        **_conditions(sample, record),
                        CAPTIONS: json.dumps({"text": sample.captions}).encode(),
                    }
                )


def _conditions(sample: _Sample, record: CacheRecord) -> dict[str, bytes]:
    conditions = conditions_in(sample.pair.conditioning_pixels, record.channels_of_conditions)
    return dict(zip(condition_members(len(conditions)), map(png, conditions), strict=True))


def _pixels(sample: _Sample) -> npt.NDArray[np.uint8]:
    assert sample.pair.pixels is not None, "a cache is not made of another"
    return sample.pair.pixels
