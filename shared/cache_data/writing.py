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
from shared.data.cached_latents import CachedImage, Latents, pack
from shared.data.preprocessing import Preprocessed, preprocess, preprocess_with_sizes
from shared.data.sample import BadSampleError, RawSample, SkippedSamples
from shared.data.sources.base import RandomAccessSource
from shared.data.sources.cached import CAPTIONS, CONDITION, LATENTS
from shared.data.workers import Workers, threads_beside_accelerators
from shared.outgoing.atomic_files import write_atomically
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 1000  # what is lost at most when the work is stopped; some 100 MB at 512 px


class _Pair(NamedTuple):
    """A sample that can be used, decoded; its place in the data is its key."""

    place: int
    image: Preprocessed
    conditioning_pixels: npt.NDArray[np.uint8]  # [R,R,3]
    captions: tuple[str, ...]


def write_shards(
    folder: Path, source: RandomAccessSource, config: TrainConfig, record: CacheRecord, encoder: ImageEncoder
) -> int:
    """Encode all images of a source that are not in the folder's shards yet. Returns how many samples were bad.

    Raises:
        UserError: more are bad than `max_skipped_samples` allows, or the disk is full.
    """
    starts = [start for start in range(0, len(source), SAMPLES_PER_SHARD) if not shard_path(folder, start).is_file()]
    skipped = SkippedSamples(config.max_skipped_samples)
    count = sum(min(SAMPLES_PER_SHARD, len(source) - start) for start in starts)
    workers = Workers(config.dataloader_num_workers or threads_beside_accelerators())
    try:
        with tqdm(total=count, desc="VAE", unit="image", disable=not logger.isEnabledFor(logging.INFO)) as progress:
            for start in starts:
                indices = range(start, min(start + SAMPLES_PER_SHARD, len(source)))
                pairs = _pairs(source, indices, config, skipped, workers, progress)
                path = shard_path(folder, start)
                try:
                    write_atomically(path, partial(_write, pairs=pairs, record=record, encoder=encoder))
                except OSError as error:
                    raise UserError(
                        f"{shown(path)} cannot be written ({error.strerror}). If the disk is full, free some room and "
                        "start again: what is written so far is kept."
                    ) from error
    finally:
        workers.close()
    return len(skipped)


def shard_path(folder: Path, start: int) -> Path:
    """The shard of the samples from the one at `start` on."""
    return folder / f"cache-{start // SAMPLES_PER_SHARD:06d}.tar"


def _pairs(
    source: RandomAccessSource,
    indices: range,
    config: TrainConfig,
    skipped: SkippedSamples,
    workers: Workers,
    progress: "tqdm[Any]",
) -> Iterator[_Pair]:
    """In the order of the indices, decoded ahead by the threads; bad samples are left out."""
    results: dict[int, _Pair | None] = {}

    def read(index: int) -> None:
        sample = source[index]
        try:
            results[index] = _pair(index, sample, config)
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
            pair = results.pop(index)
            if pair is not None:
                yield pair
    finally:
        for _, future in ahead:
            future.cancel()


def _pair(index: int, sample: RawSample, config: TrainConfig) -> _Pair:
    sample.check()
    image, condition = sample.image, sample.conditioning_image
    assert image is not None
    assert not isinstance(image, CachedImage), "a cache is not made of another"
    assert condition is not None
    how = (config.resolution, config.image_interpolation_mode)
    return _Pair(index, preprocess_with_sizes(image, *how), preprocess(condition, *how), sample.captions)


def _write(temporary: Path, *, pairs: Iterator[_Pair], record: CacheRecord, encoder: ImageEncoder) -> None:
    # A fixed time and owner: what is made again is the same file.
    with temporary.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0) as tar:
        while some := list(itertools.islice(pairs, encoder.rows)):
            # Always as many rows, so that one compiled program does; the last one counts once.
            pixels_BRR3 = np.stack([pair.image.pixels for pair in some + some[-1:] * (encoder.rows - len(some))])
            for pair, mean_HWC, std_HWC in zip(some, *encoder.encode(pixels_BRR3), strict=False):
                latents = Latents(mean_HWC, std_HWC, pair.image.sizes)
                tar.write(
                    {
                        "__key__": f"{pair.place:09d}",
                        LATENTS: pack(latents, record.layout),
                        CONDITION: _as_png(pair.conditioning_pixels),
                        CAPTIONS: json.dumps({"text": pair.captions}).encode(),
                    }
                )


def _as_png(pixels_RR3: npt.NDArray[np.uint8]) -> bytes:
    """Without loss, and with one channel where all three are the same."""
    is_grey = bool((pixels_RR3[..., :1] == pixels_RR3).all())
    content = io.BytesIO()
    PIL.Image.fromarray(pixels_RR3[..., 0] if is_grey else pixels_RR3).save(content, "PNG", compress_level=1)
    return content.getvalue()
