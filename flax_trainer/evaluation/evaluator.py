"""Losses and images from the ControlNet in training, on all devices; of several processes, all have to ask together."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from flax_trainer.distributed.engine import Engine
from flax_trainer.evaluation.image_sampler import ImageSampler
from flax_trainer.models.params import Params
from flax_trainer.training.step import FrozenParams, ModelDefs, Objective, make_evaluation_step
from shared.data.batches import Batch
from shared.evaluation.validation import ModelsInTraining


class LossEvaluator:
    """Per-sample losses of a batch."""

    def __init__(self, engine: Engine, defs: ModelDefs, objective: Objective):
        self._losses = engine.compile_for_rows(make_evaluation_step(engine.adapt(defs), objective))

    def __call__(self, params: Params, frozen: FrozenParams, batch: Batch) -> np.ndarray:
        """float32 [B] for a batch whose arrays begin with the axis B, a multiple of the number of devices."""
        return self._losses(params, frozen, batch)


@dataclass(frozen=True)
class Evaluator:
    """What `shared.evaluation.validation` asks of the models; without images to make there is no sampler."""

    losses: LossEvaluator
    sampler: ImageSampler | None
    frozen: FrozenParams

    def at(self, params: Params) -> ModelsInTraining:
        """With these placed parameters in place of those in training."""
        return ModelsInTraining(partial(self.losses, params, self.frozen), partial(self._images, params))

    def _images(self, params: Params, prompts: list[str], conditions_RHWC: np.ndarray) -> np.ndarray:
        assert self.sampler is not None, "a run that asks for images has a sampler"
        return self.sampler(params, self.frozen, prompts, conditions_RHWC)
