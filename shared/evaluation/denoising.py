"""The denoising loss on a fixed validation set: the same pictures, noise and timesteps whenever it is taken.

The training loss jumps with the timesteps and the noise that a batch happens to draw; where both are fixed, what
changes is the model. The loss depends strongly on the timestep, so it is also reported by timestep bin.
Reference: Ho et al. 2020, eq. 14, for the loss; Esser et al. 2024 ("Scaling Rectified Flow Transformers for
High-Resolution Image Synthesis") for the validation loss as a measure of a diffusion model's training.

Axes: B rows of a batch, R resolution, N channels of a condition, L tokens, H W C of the latents.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.config import TrainConfig
from shared.data.batches import Batch
from shared.data.decoded_pairs import DecodedPair, PairDecoder
from shared.data.sample import BadSampleError, SkippedSamples
from shared.data.sources.base import RandomAccessSource
from shared.data.tokenization import PromptInputs
from shared.randomness import Purpose, generator
from shared.user_errors import UserError

PerSampleLosses = Callable[[Batch], npt.NDArray[Any]]
"""What a backend supplies: a batch → the loss of each row [B], its mean over H, W, C as in the training loss."""

BINS = 4


@dataclass(frozen=True)
class ValidationSample:
    """A pair and its caption; `index` is its place in the held-out source."""

    index: int
    pair: DecodedPair
    caption: str

    @property
    def pixels(self) -> npt.NDArray[np.uint8] | None:
        """See `DecodedPair`."""
        return self.pair.pixels

    @property
    def conditioning_pixels(self) -> npt.NDArray[np.uint8]:
        """See `DecodedPair`."""
        return self.pair.conditioning_pixels


def read_samples(held_out: RandomAccessSource, config: TrainConfig) -> list[ValidationSample]:
    """The usable samples, each with the first of its captions; bad ones are skipped and logged.

    Args:
        held_out: all of it is read.
        config: read for max_skipped_samples and for what `PairDecoder` reads.

    Raises:
        UserError: no sample is usable, or more are bad than `max_skipped_samples` allows.
    """
    skipped, decode = SkippedSamples(config.max_skipped_samples), PairDecoder(config)
    samples: list[ValidationSample] = []
    for index in range(len(held_out)):
        candidate = held_out[index]
        try:
            samples.append(ValidationSample(index, decode(candidate), candidate.captions[0]))
        except BadSampleError as error:
            skipped.add(candidate.name, error)
    decode.report()
    if not samples:
        raise UserError(f"None of the {len(held_out)} held-out samples can be read. Repair the data, or hold out more.")
    return samples


class DenoisingEvaluation:
    """Every sample at one timestep in every bin, with its own noise: a fixed function of samples and seed.

    Row r is sample r // bins in bin r % bins. Its draws are keyed by (seed, Purpose.EVALUATION, r), so they do not
    depend on how rows are batched. A batch has the keys of `shared.data.batches` and the leading axis [B]; the last
    one is filled up with the last row, which counts once.
    """

    def __init__(
        self,
        samples: Sequence[ValidationSample],
        prompt_inputs: PromptInputs,
        seed: int,
        batch_size: int,
        latent_shape: tuple[int, int, int],
        num_train_timesteps: int,
        bins: int = BINS,
    ) -> None:
        """Tokenizes the captions.

        Args:
            samples: see `read_samples`.
            prompt_inputs: as those of training.
            seed: the run's.
            batch_size: B of every batch.
            latent_shape: (H, W, C) of one sample's latents.
            num_train_timesteps: of the noise schedule.
            bins: equal parts of the timesteps, reported apart.

        Raises:
            UserError: no samples, a batch size below 1, or bins that are not between 1 and the number of timesteps.
        """
        if not samples:
            raise UserError("The validation set is empty; give at least one sample.")
        if batch_size < 1:
            raise UserError(f"The validation batch size is {batch_size}; expected at least 1.")
        if not 1 <= bins <= num_train_timesteps:
            raise UserError(f"{bins} timestep bins were asked for; expected 1 to {num_train_timesteps}, the timesteps.")
        self._samples, self._seed, self._batch_size, self._latent_shape = samples, seed, batch_size, latent_shape
        sizes = np.array([sample.pair.sizes for sample in samples], np.float32)
        self._prompt_inputs = prompt_inputs([sample.caption for sample in samples], sizes)
        self._edges = [bin_ * num_train_timesteps // bins for bin_ in range(bins + 1)]
        self._rows = len(samples) * bins

    def batches(self) -> Iterator[Batch]:
        """Arrays begin with [B]; `pixel_values`, … as in `BatchLoader`, `position` int64 being the row."""
        for start in range(0, self._rows, self._batch_size):
            rows = [min(row, self._rows - 1) for row in range(start, start + self._batch_size)]
            yield self._batch(rows)

    def run(self, per_sample_losses: PerSampleLosses) -> dict[str, float]:
        """`validation_loss`, and by bin `validation_loss_t000-249`, …: means over the rows.

        Raises:
            UserError: the losses are not one number per row.
        """
        losses = np.concatenate([self._checked(per_sample_losses(batch)) for batch in self.batches()])[: self._rows]
        losses_SN = losses.astype(np.float64).reshape(-1, len(self._edges) - 1)
        by_bin = dict(zip(self._names(), map(float, losses_SN.mean(axis=0)), strict=True))
        return {"validation_loss": float(losses_SN.mean())} | by_bin

    def _batch(self, rows: Sequence[int]) -> Batch:
        bins = len(self._edges) - 1
        samples = [self._samples[row // bins] for row in rows]
        draws = [self._draw(row) for row in rows]
        return {
            **{name: np.stack([sample.pair.arrays[name] for sample in samples]) for name in samples[0].pair.arrays},
            **{name: array[[row // bins for row in rows]] for name, array in self._prompt_inputs.items()},
            "vae_noise": np.stack([vae_noise for vae_noise, _, _ in draws]),
            "noise": np.stack([noise for _, noise, _ in draws]),
            "timesteps": np.array([timestep for _, _, timestep in draws], np.int32),
            "position": np.array(rows, np.int64),
        }

    def _draw(self, row: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], int]:
        rng = generator(self._seed, Purpose.EVALUATION, row)
        bin_ = row % (len(self._edges) - 1)
        timestep = int(rng.integers(self._edges[bin_], self._edges[bin_ + 1]))
        vae_noise, noise = (rng.standard_normal(self._latent_shape, dtype=np.float32) for _ in range(2))
        return vae_noise, noise, timestep

    def _checked(self, losses: npt.NDArray[Any]) -> npt.NDArray[Any]:
        losses = np.asarray(losses)
        if losses.shape != (self._batch_size,):
            raise UserError(f"The validation losses of a batch are {losses.shape}; expected ({self._batch_size},).")
        return losses

    def _names(self) -> list[str]:
        digits = len(str(self._edges[-1] - 1))
        return [
            f"validation_loss_t{first:0{digits}}-{end - 1:0{digits}}"
            for first, end in zip(self._edges[:-1], self._edges[1:], strict=True)
        ]
