"""Losses and images from the ControlNet in training, on all devices; of several processes, all have to ask together."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from flax_trainer.base_models import FrozenParams
from flax_trainer.distributed.engine import RowsOnHost
from flax_trainer.evaluation.image_sampler import ImageSampler
from flax_trainer.models.params import Params
from shared.evaluation.validation import ModelsInTraining


@dataclass(frozen=True)
class Evaluator:
    """What `shared.evaluation.validation` asks of the models.

    Attributes:
        losses: a compiled `make_evaluation_step`.
        sampler: None where a run makes no images.
    """

    losses: RowsOnHost
    sampler: ImageSampler | None
    frozen: FrozenParams

    def models_in_training(self, params: Params) -> ModelsInTraining:
        """With these placed parameters."""
        return ModelsInTraining(partial(self.losses, params, self.frozen), partial(self._images, params))

    def _images(self, params: Params, prompts: list[str], conditions_RHWC: np.ndarray) -> np.ndarray:
        assert self.sampler is not None, "a run that asks for images has a sampler"
        return self.sampler(params, self.frozen, prompts, conditions_RHWC)
