"""Samples → the shards of a cache: each appears whole, and is kept when the work is taken up again.

Axes: B images encoded at once, R resolution, H W C of the latents.
"""

import io
import itertools
import json
import logging
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image
import webdataset
from tqdm import tqdm

from shared.cache_data.encoders import ImageEncoder
from shared.config import TrainConfig
from shared.data.cache_record import CacheRecord
from shared.data.cached_latents import Latents, pack
from shared.data.decoded_pairs import DecodedPair, PairDecoder
from shared.data.sample import BadSampleError, SkippedSamples
from shared.data.sources.base import RandomAccessSource
from shared.data.sources.cached import CAPTIONS, CONDITION, LATENTS
from shared.data.workers import Workers, threads_beside_accelerators
from shared.outgoing.atomic_files import write_atomically
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
    folder: Path, source: RandomAccessSource, config: TrainConfig, record: CacheRecord, encoder: ImageEncoder
) -> int:
    """Encode all images of a source that are not in the folder's shards yet. Returns how many samples were bad.

    Raises:
        UserError: more are bad than `max_skipped_samples` allows, or the disk is full.
    """
    starts = [start for start in range(0, len(source), SAMPLES_PER_SHARD) if not shard_path(folder, start).is_file()]
    skipped, decode = SkippedSamples(config.max_skipped_samples), PairDecoder(config)
    count = sum(min(SAMPLES_PER_SHARD, len(source) - start) for start in starts)
    workers = Workers(config.dataloader_num_workers or threads_beside_accelerators())
    try:
        with tqdm(total=count, desc="VAE", unit="image", disable=not logger.isEnabledFor(logging.INFO)) as progress:
            for start in starts:
                indices = range(start, min(start + SAMPLES_PER_SHARD, len(source)))
                samples = _samples(source, indices, decode, skipped, workers, progress)
                path = shard_path(folder, start)
                try:
                    write_atomically(path, partial(_write, samples=samples, record=record, encoder=encoder))
                except OSError as error:
                    raise UserError(
                        f"{shown(path)} cannot be written ({error.strerror}). If the disk is full, free some room and "
                        "start again: what is written so far is kept."
                    ) from error
    finally:
        workers.close()
        decode.report()
    return len(skipped)


def shard_path(folder: Path, start: int) -> Path:
    """The shard of the samples from the one at `start` on."""
    return folder / f"cache-{start // SAMPLES_PER_SHARD:06d}.tar"


def _samples(
    source: RandomAccessSource,
    indices: range,
    decode: PairDecoder,
    skipped: SkippedSamples,
    workers: Workers,
    progress: "tqdm[Any]",
) -> Iterator[_Sample]:
    """In the order of the indices, decoded ahead by the threads; bad samples are left out."""
    results: dict[int, _Sample | None] = {}

    def read(index: int) -> None:
        sample = source[index]
        try:
            results[index] = _Sample(index, decode(sample), sample.captions)
        except BadSampleError as error:
            skipped.add(sample.name, error)
            results[index] = None

    remaining, ahead = iter(indices), deque[tuple[int, Any]]()
    try:
        for index in indices:
            for new in itertools.islice(remaining, max(0, 64 - len(ahead))):
                ahead.append((new, workers.submit(partial(read, new))))
            _, future = ahead.popleft()
            future.result()
            progress.update()
            sample = results.pop(index)
            if sample is not None:
                yield sample
    finally:
        for _, future in ahead:
            future.cancel()


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
                        CONDITION: _as_png(sample.pair.conditioning_pixels),
                        CAPTIONS: json.dumps({"text": sample.captions}).encode(),
                    }
                )


def _pixels(sample: _Sample) -> npt.NDArray[np.uint8]:
    assert sample.pair.pixels is not None, "a cache is not made of another"
    return sample.pair.pixels


def _as_png(pixels_RRN: npt.NDArray[np.uint8]) -> bytes:
    """Without loss, and with one channel where all are the same."""
    is_grey = bool((pixels_RRN[..., :1] == pixels_RRN).all())
    content = io.BytesIO()
    PIL.Image.fromarray(pixels_RRN[..., 0] if is_grey else pixels_RRN).save(content, "PNG", compress_level=1)
    return content.getvalue()
