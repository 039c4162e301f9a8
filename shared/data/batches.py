"""Samples → batches, each a pure function of (data manifest, seed, optimizer step).

Axes: A microbatches of a step, B rows of a microbatch on this host, Y X height and width of pictures, N channels of all
conditions, L tokens, H W C of the latents.
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.config import TrainConfig
from shared.data.buckets.shapes import named
from shared.data.buckets.source import BucketedSource
from shared.data.candidates import BucketedCandidates, Candidates, ShuffledCandidates, StreamCandidates
from shared.data.decoded_pairs import ArrayShapes, DecodedPair, PairDecoder, shapes_of_pairs
from shared.data.lanes import candidates_in_lanes
from shared.data.sample import BadSampleError, RawSample, SkippedSamples
from shared.data.sources.base import RandomAccessSource, Source, StreamsInLanes
from shared.data.tokenization import PromptInputs
from shared.data.views import Placement, Size
from shared.data.workers import Workers
from shared.models.xl import SIZES
from shared.randomness import Purpose, generator
from shared.user_errors import UserError

Batch = dict[str, npt.NDArray[Any]]

_STEPS_AHEAD = 2
_SAMPLES_AHEAD = 32  # of a source whose samples take time on their way


@dataclass(frozen=True)
class BatchSpec:
    """How many images make an optimizer step, and how they are divided.

    Which samples a step sees depends on nothing here but their product.

    Attributes:
        per_device: images of one device in one microbatch.
        devices: over all hosts.
        accumulation_steps: microbatches, each passed forward and backward before the optimizer moves once.
    """

    per_device: int
    devices: int = 1
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"{field.name} is {getattr(self, field.name)}; expected at least 1")

    @property
    def rows(self) -> int:
        """Images per microbatch, over all devices."""
        return self.per_device * self.devices

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step, over all devices and microbatches."""
        return self.per_device * self.devices * self.accumulation_steps

    def positions(self, step: int, process_index: int, process_count: int) -> npt.NDArray[np.int64]:
        """[A,B], of the rows that a host takes: h of P has rows h·B to (h+1)·B of every microbatch."""
        rows = self.rows // process_count
        rows_B = np.arange(process_index * rows, (process_index + 1) * rows, dtype=np.int64)
        microbatches_A = np.arange(self.accumulation_steps, dtype=np.int64) * self.rows
        return step * self.global_batch_size + microbatches_A[:, None] + rows_B[None, :]

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} images per step = {self.per_device} per device × {self.devices} devices × "
            f"{self.accumulation_steps} accumulated"
        )


class BatchLoader:
    """This host's part of every optimizer step's batch.

    A batch is a dict of arrays that begin with the axes [A, B]:

    - `pixel_values` uint8 [A,B,Y,X,3] and `conditioning_pixel_values` uint8 [A,B,Y,X,N], 0 to 255, cut from one place;
      for images that are encoded already `latent_mean` and `latent_std` [A,B,H,W,C] in place of the first, float32,
      float16, or uint16 for the bits of bfloat16;
    - `input_ids` int32 [A,B,L];
    - for Stable Diffusion XL, `input_ids_2` int32 [A,B,L] of its second text encoder and `time_ids` float32 [A,B,6];
    - `vae_noise`, `noise` float32 [A,B,H,W,C], standard normal;
    - `timesteps` int32 [A,B], 0 ≤ t < num_train_timesteps;
    - `position` int64 [A,B], counted from 0 over the whole run: step·G + microbatch·G/A + row.

    Epochs follow each other without a gap, so no sample is dropped and none is weighted twice. A bad sample is replaced
    by the next usable one of its epoch, logged, and counted in `skipped`.

    Y and X are --resolution; of a source in aspect buckets they are those of the step's bucket, and H and W in
    proportion.
    """

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        prompt_inputs: PromptInputs,
        spec: BatchSpec,
        latent_shape: tuple[int, int, int],
        num_train_timesteps: int,
        process_index: int = 0,
        process_count: int = 1,
        default_workers: int = 0,
    ) -> None:
        """Starts `dataloader_num_workers` threads; `close` ends them.

        Args:
            source: see `open_source`.
            config: read for seed, random_flip, random_crop, proportion_empty_prompts, max_skipped_samples,
                dataloader_num_workers, and for what `PairDecoder` reads.
            prompt_inputs: called in the thread that asks for batches and, with worker threads, in all of them at once.
            spec: how the global batch is cut up.
            latent_shape: (H, W, C) of the latents of one square sample.
            num_train_timesteps: of the noise schedule.
            process_index: which host this is. Host h of P takes rows h·B to (h+1)·B of every microbatch.
            process_count: how many hosts there are.
            default_workers: threads where the configuration says nothing of `dataloader_num_workers`.

        Raises:
            UserError: for an empty source, or devices that the hosts cannot share evenly.
        """
        if spec.devices % process_count:
            raise UserError(
                f"{spec.rows} rows on {spec.devices} devices cannot be shared by {process_count} hosts; "
                "every host must have equally many devices"
            )
        self._source, self._candidates = source, _candidates(source, config, spec, process_index, process_count)
        self._config, self._prompt_inputs, self._spec = config, prompt_inputs, spec
        self._square_latent_shape, self._num_train_timesteps = latent_shape, num_train_timesteps
        self._process_index, self._process_count = process_index, process_count
        self._skipped, self._decode = SkippedSamples(config.max_skipped_samples), PairDecoder(config)
        workers = default_workers if config.dataloader_num_workers is None else config.dataloader_num_workers
        self._workers = Workers(workers) if workers else None

    @property
    def skipped(self) -> int:
        """How many distinct bad samples this host has met."""
        return len(self._skipped)

    @property
    def mismatched(self) -> int:
        """How many distinct pairs of two shapes this host has met, whatever became of them."""
        return self._decode.mismatched

    @property
    def sizes(self) -> list[Size]:
        """Every (width, height) that the pictures of a step may have."""
        if isinstance(self._source, BucketedSource):
            return [bucket.size for bucket in self._source.buckets]
        return [(self._config.resolution, self._config.resolution)]

    def size_of(self, step: int) -> Size:
        """(width, height) of the pictures of optimizer step `step`, counted from 0."""
        if isinstance(self._candidates, BucketedCandidates):
            return self._candidates.size_of(step)
        return self._config.resolution, self._config.resolution

    def batch(self, step: int) -> Batch:
        """The batch of optimizer step `step`, counted from 0, computed in the calling thread.

        Raises:
            UserError: when more than `max_skipped_samples` samples are bad, or a whole epoch is.
        """
        self._candidates.forget_before(step * self._spec.global_batch_size)
        unfinished = self._begin(step)
        for row in range(unfinished.count):
            self._fill(unfinished, row)
        return self._finish(unfinished)

    def blank(self, size: Size | None = None) -> Batch:
        """A batch of the right names, shapes and dtypes, without any data in it; without `size`, that of step 0."""
        return self._finish(self._unfinished(0, size or self.size_of(0)))

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self.iterate()

    def iterate(self, start_step: int = 0) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from `start_step` on without end, prepared ahead by the worker threads."""
        if self._workers is None:
            self._announce(range(start_step, start_step + self._announced_ahead))
            for step in itertools.count(start_step):
                self._announce([step + self._announced_ahead])
                yield step, self.batch(step)
        else:
            yield from self._prefetch(start_step, self._workers)

    def close(self) -> None:
        """Stop the worker threads, and say how many samples were used otherwise than they are.

        Batches already handed out stay valid.
        """
        if self._workers is not None:
            self._workers.close()
        self._decode.report()
        self._prompt_inputs.report()

    def _prefetch(self, start_step: int, workers: Workers) -> Iterator[tuple[int, Batch]]:
        """The threads do all the work of a batch, so that whoever asks for it next finds it finished."""
        ahead: deque[Future[list[Future[Batch | None]]]] = deque()
        to_submit = itertools.count(start_step)
        self._announce(range(start_step, start_step + self._announced_ahead + 1))
        try:
            for step in itertools.count(start_step):
                while len(ahead) <= _STEPS_AHEAD:
                    ahead.append(workers.submit(partial(self._begin_in_threads, next(to_submit), start_step, workers)))
                yield step, _finished_by_its_last_row(ahead.popleft().result())
        finally:
            for begun in ahead:
                if not begun.cancel() and begun.done() and begun.exception() is None:
                    for row in begun.result():
                        row.cancel()

    def _begin_in_threads(self, step: int, start_step: int, workers: Workers) -> list[Future[Batch | None]]:
        """Have the rows of a step filled, while that is asked for which comes `_STEPS_AHEAD` steps before it."""
        asked_for = step - _STEPS_AHEAD
        self._candidates.forget_before(max(start_step, asked_for) * self._spec.global_batch_size)
        if asked_for > start_step:
            self._announce([asked_for + self._announced_ahead])
        unfinished = self._begin(step)
        return [workers.submit(partial(self._fill_and_finish, unfinished, row)) for row in range(unfinished.count)]

    def _fill_and_finish(self, unfinished: "_UnfinishedBatch", row: int) -> Batch | None:
        """The batch, where this was the last of its rows to be filled."""
        self._fill(unfinished, row)
        return self._finish(unfinished) if unfinished.count_filled() else None

    @property
    def _announced_ahead(self) -> int:
        """For so many steps after that which is asked for, the samples are on their way."""
        return max(_STEPS_AHEAD, -(-_SAMPLES_AHEAD // self._positions(0).size))

    def _announce(self, steps: Iterable[int]) -> None:
        for step in steps:
            self._candidates.expect(map(int, self._positions(step).flat))

    def _positions(self, step: int) -> npt.NDArray[np.int64]:
        return self._spec.positions(step, self._process_index, self._process_count)

    def _begin(self, step: int) -> "_UnfinishedBatch":
        return self._unfinished(step, self.size_of(step))

    def _unfinished(self, step: int, size: Size) -> "_UnfinishedBatch":
        pair_shapes = shapes_of_pairs(self._source, self._config, size)
        return _UnfinishedBatch(self._positions(step), size, pair_shapes, self._latent_shape(size))

    def _latent_shape(self, size: Size) -> tuple[int, int, int]:
        (width, height), (square_height, square_width, channels) = size, self._square_latent_shape
        resolution = self._config.resolution
        return height * square_height // resolution, width * square_width // resolution, channels

    def _fill(self, unfinished: "_UnfinishedBatch", row: int) -> None:
        position = int(unfinished.positions[row])
        seed, arrays = self._config.seed, unfinished.arrays
        rows = {name: arrays[name][row] for name in unfinished.pair_names}
        sample, pair = self._usable_sample(position, rows, unfinished.size)
        unfinished.sizes[row] = pair.sizes
        unfinished.captions[row] = self._caption(sample, position)
        for name, purpose in (("vae_noise", Purpose.VAE_NOISE), ("noise", Purpose.NOISE)):
            generator(seed, purpose, position).standard_normal(dtype=np.float32, out=arrays[name][row])
        arrays["timesteps"][row] = generator(seed, Purpose.TIMESTEP, position).integers(self._num_train_timesteps)

    def _finish(self, unfinished: "_UnfinishedBatch") -> Batch:
        width, height = unfinished.size
        told = self._prompt_inputs.of_crops(height, width)(unfinished.captions, unfinished.sizes)
        arrays = unfinished.arrays | told | {"position": unfinished.positions}
        leading = (self._spec.accumulation_steps, self._spec.rows // self._process_count)
        return {name: array.reshape(leading + array.shape[1:]) for name, array in arrays.items()}

    def _usable_sample(
        self, position: int, rows: Mapping[str, npt.NDArray[Any]], size: Size
    ) -> tuple[RawSample, DecodedPair]:
        """Decoded into `rows`, by their names in a batch."""
        placement = self._placement(position)
        for sample in self._candidates.at(position):
            try:
                return sample, self._decode(sample, placement, rows, size)
            except BadSampleError as error:
                self._skipped.add(sample.name, error)
        of_shape = f" of the shape {named(size)}" if len(self.sizes) > 1 else ""
        raise UserError(
            f"none of the training samples{of_shape} can be used ({self.skipped} were tried; the log names each with "
            "its reason). Repair the data, or check that the columns or keys hold what they should"
        )

    def _placement(self, position: int) -> Placement:
        config = self._config
        corner = generator(config.seed, Purpose.CROP, position).random(2) if config.random_crop else None
        flipped = config.random_flip and generator(config.seed, Purpose.FLIP, position).random() < 0.5
        return Placement(None if corner is None else (float(corner[0]), float(corner[1])), bool(flipped))

    def _caption(self, sample: RawSample, position: int) -> str:
        """A dropped one is the empty text, which the encoders (for SDXL both) encode as any other.

        diffusers' `train_controlnet_sdxl.py` does so too, although its pipeline is guided away from zeros.
        """
        seed = self._config.seed
        if generator(seed, Purpose.CAPTION_DROPOUT, position).random() < self._config.proportion_empty_prompts:
            return ""
        return sample.captions[int(generator(seed, Purpose.CAPTION, position).integers(len(sample.captions)))]


class _UnfinishedBatch:
    """Arrays of one batch with flat rows, which threads fill each its own."""

    def __init__(
        self,
        positions_AB: npt.NDArray[np.int64],
        size: Size,
        pair_shapes: ArrayShapes,
        latent_shape: tuple[int, int, int],
    ) -> None:
        self.size, self.pair_names = size, tuple(pair_shapes)
        self.positions = positions_AB.reshape(-1)
        self.count = self._unfilled = positions_AB.size
        self._lock = threading.Lock()
        self.captions = [""] * self.count
        self.sizes = np.zeros((self.count, SIZES), np.float32)
        self.arrays: Batch = {
            **{name: np.empty((self.count, *shape), dtype) for name, (shape, dtype) in pair_shapes.items()},
            "vae_noise": np.empty((self.count, *latent_shape), np.float32),
            "noise": np.empty((self.count, *latent_shape), np.float32),
            "timesteps": np.empty(self.count, np.int32),
        }

    def count_filled(self) -> bool:
        """Count a row that was filled. Whether it was the last."""
        with self._lock:
            self._unfilled -= 1
            return self._unfilled == 0


def _finished_by_its_last_row(rows: list[Future[Batch | None]]) -> Batch:
    """What went wrong in the first of those where anything did, is raised."""
    results = [row.result() for row in rows]
    return next(batch for batch in results if batch is not None)


def _candidates(
    source: Source, config: TrainConfig, spec: BatchSpec, process_index: int, process_count: int
) -> Candidates:
    if isinstance(source, BucketedSource):
        return BucketedCandidates(source, config.seed, spec.global_batch_size)
    if isinstance(source, RandomAccessSource):
        return ShuffledCandidates(source, config.seed)
    if isinstance(source, StreamsInLanes):
        positions_of_hosts = [spec.positions(0, host, process_count) for host in range(process_count)]
        return candidates_in_lanes(source, positions_of_hosts, process_index, config.max_skipped_samples)
    return StreamCandidates(source, config.max_skipped_samples)
