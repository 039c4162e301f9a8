"""What happens every `--validation_steps`: validation images, and the figures on held-out samples."""

import logging
from dataclasses import dataclass

import jax
import numpy as np

from flax_trainer.image_sampler import ImageSampler
from flax_trainer.models.functional import Params
from flax_trainer.pmap_engine import shard_rows
from flax_trainer.step import FrozenParams, ModelDefs, Objective, make_evaluation_step
from shared.data.batches import Batch
from shared.evaluation.held_out import HeldOutEvaluation
from shared.tracking import Tracker
from shared.validation_images import ValidationImages

logger = logging.getLogger("flax_trainer")


class LossEvaluator:
    """Per-sample losses of a batch, computed on all local devices."""

    def __init__(self, defs: ModelDefs, objective: Objective):
        self._losses = jax.pmap(make_evaluation_step(defs, objective))

    def __call__(self, controlnet_params: Params, frozen: FrozenParams, batch: Batch) -> np.ndarray:
        """float32 [B] for a batch whose arrays begin with the axis B, a multiple of the number of local devices."""
        sharded = {name: shard_rows(array) for name, array in batch.items()}
        return np.asarray(self._losses(controlnet_params, frozen, sharded)).reshape(-1)


@dataclass(frozen=True)
class Validation:
    """Whatever of it a run asks for; without images to make there is no sampler."""

    images: ValidationImages | None
    held_out: HeldOutEvaluation | None
    sampler: ImageSampler | None
    losses: LossEvaluator
    tracker: Tracker

    def draw(self, controlnet_params: Params, frozen: FrozenParams, step: int) -> None:
        """Make and write the validation images."""
        if self.images is None:
            return
        images_RHWC = self._sample(controlnet_params, frozen, self.images.prompts, self.images.conditions_RHWC)
        folder = self.images.write(images_RHWC, step, self.tracker)
        logger.info("Validation images of step %d are in %s", step, folder)

    def measure(self, controlnet_params: Params, frozen: FrozenParams, step: int) -> dict[str, float]:
        """The figures on the held-out samples; none where none are held out."""
        if self.held_out is None:
            return {}
        return self.held_out.run(
            step,
            lambda batch: self.losses(controlnet_params, frozen, batch),
            lambda prompts, conditions: self._sample(controlnet_params, frozen, prompts, conditions),
        )

    def _sample(
        self, controlnet_params: Params, frozen: FrozenParams, prompts: list[str], conditions_RHWC: np.ndarray
    ) -> np.ndarray:
        assert self.sampler is not None, "a run that asks for images has a sampler"
        return self.sampler(controlnet_params, frozen, prompts, conditions_RHWC)
