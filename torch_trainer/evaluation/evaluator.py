"""Losses and images from the ControlNet in training: every process does its share, and all have the whole.

Axes: R rows asked for, P processes, B rows of a process.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from shared.data.batches import Batch
from shared.evaluation.validation import ModelsInTraining
from torch_trainer.base_models import BaseModels
from torch_trainer.evaluation.image_sampler import ImageSampler
from torch_trainer.training.step import Objective, per_sample_losses, to_device
from torch_trainer.training.weight_average import WeightAverage


@dataclass(frozen=True)
class Evaluator:
    """What `shared.evaluation.validation` asks of the models; all processes have to ask together.

    Attributes:
        sampler: None where a run makes no images.
    """

    accelerator: Accelerator
    models: BaseModels
    objective: Objective
    sampler: ImageSampler | None
    average: WeightAverage | None = None

    def models_in_training(self) -> ModelsInTraining:
        """With their averaged weights, where there are any."""
        return ModelsInTraining(self._losses, self._images)

    def _result(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.in_place()

    @torch.no_grad()
    def _losses(self, batch: Batch) -> np.ndarray:
        """float32 [R] for a batch of R rows, a multiple of the number of processes."""
        rows = len(batch["timesteps"]) // self.accelerator.num_processes
        first = rows * self.accelerator.process_index
        share = to_device({name: array[first : first + rows] for name, array in batch.items()}, self.accelerator.device)
        with self._result():
            losses_B = per_sample_losses(self.models, share, self.objective)
        return self.accelerator.gather(losses_B).cpu().numpy()

    @torch.no_grad()
    def _images(self, prompts: list[str], conditions_RHWC: np.ndarray) -> np.ndarray:
        """uint8 [R,H,W,C]. Image r depends on the seed and r alone, whichever process makes it."""
        assert self.sampler is not None, "a run that asks for images has a sampler"
        count, processes = len(prompts), self.accelerator.num_processes
        share = -(-count // processes)
        first = share * self.accelerator.process_index
        # Every process makes as many as the others, for with shared parameters each forward pass is a common one.
        rows = [min(row, count - 1) for row in range(first, first + share)]
        with self._result():
            images_BHWC = self.sampler([prompts[row] for row in rows], conditions_RHWC[rows], rows)
        gathered = self.accelerator.gather(images_BHWC.to(self.accelerator.device))
        return gathered.cpu().numpy()[:count]
