"""Losses and images from the ControlNet in training, on all local devices."""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from flax_trainer.image_sampler import ImageSampler
from flax_trainer.models.functional import Params
from flax_trainer.pmap_engine import shard_rows
from flax_trainer.step import FrozenParams, ModelDefs, Objective, make_evaluation_step
from shared.data.batches import Batch
from shared.validation import ModelsInTraining


class LossEvaluator:
    """Per-sample losses of a batch, computed on all local devices."""

    def __init__(self, defs: ModelDefs, objective: Objective):
        self._losses = jax.pmap(make_evaluation_step(defs, objective))

    def __call__(self, params: Params, frozen: FrozenParams, batch: Batch) -> np.ndarray:
        """float32 [B] for a batch whose arrays begin with the axis B, a multiple of the number of local devices."""
        sharded = {name: shard_rows(array) for name, array in batch.items()}
        return np.asarray(self._losses(params, frozen, sharded)).reshape(-1)


@dataclass(frozen=True)
class Evaluator:
    """What `shared.validation` asks of the models; without images to make there is no sampler."""

    losses: LossEvaluator
    sampler: ImageSampler | None
    frozen: FrozenParams

    def at(self, params: Params) -> ModelsInTraining:
        """With these replicated parameters in place of those in training."""
        return ModelsInTraining(partial(self.losses, params, self.frozen), partial(self._images, params))

    def _images(self, params: Params, prompts: list[str], conditions_RHWC: np.ndarray) -> np.ndarray:
        assert self.sampler is not None, "a run that asks for images has a sampler"
        return self.sampler(params, self.frozen, prompts, conditions_RHWC)
