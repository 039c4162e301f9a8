"""The loop of a run: take a batch, take a step, and every so often validate or save."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from shared.config import TrainConfig
from shared.config.learning_rate import LearningRateSchedule
from shared.data.batches import Batch, BatchLoader
from shared.evaluation.validation import ModelsInTraining, Validation
from shared.run.interruption import Interruption
from shared.run.log import NonFiniteError, RunLog, StepFigures
from shared.tracking.sparing import result_comes_first
from torch_trainer.checkpoints.safetensors_checkpoints import Checkpoints
from torch_trainer.distributed.accelerator import any_process
from torch_trainer.training.step import TrainStep


@dataclass(frozen=True)
class Loop:
    """Everything the loop uses. `record` goes into every checkpoint."""

    config: TrainConfig
    accelerator: Accelerator
    train_step: TrainStep
    loader: BatchLoader
    learning_rate: LearningRateSchedule
    checkpoints: Checkpoints
    record: dict[str, Any]
    validation: Validation
    models: ModelsInTraining
    log: RunLog

    def run(self, first_step: int, last_step: int, interruption: Interruption) -> int:
        """Steps `first_step` … `last_step - 1`; ends early, with a checkpoint, when any process is interrupted.

        Returns the number of steps that are done.

        Raises:
            NonFiniteError: after saving the last good state.
            UserError: from the data, after saving the state that it stopped at.
        """
        if first_step == last_step:  # interrupted after the last step, before its validation
            self.validation.measure_again(self.models, last_step)
            self.validation.draw(self.models, last_step)
        batches = self.loader.iterate(first_step)
        for finished in range(first_step + 1, last_step + 1):
            figures = self._step(batches, finished)
            last = finished == last_step
            interrupted = any_process(self.accelerator, interruption.requested is not None)
            save = finished % self.config.checkpointing_steps == 0 or interrupted
            validate = last or (finished % self.config.validation_steps == 0 and not interrupted)
            # Before saving: a step that a killed run's checkpoint contains is then also in its log.
            self.log.add(figures, self.validation.measure(self.models, finished) if validate else None)
            if save:
                with result_comes_first(last):
                    self.checkpoints.save(finished, self.record)
            if validate:
                self.validation.draw(self.models, finished)
            if save or validate:
                self.log.restart_clock()
            if interrupted and not last:
                return finished
        return last_step

    def _step(self, batches: Iterator[tuple[int, Batch]], finished: int) -> StepFigures:
        waiting_since = time.perf_counter()
        batch = self._next_batch(batches, finished - 1)
        data_wait = time.perf_counter() - waiting_since
        learning_rate = self.learning_rate(finished - 1)
        loss, grad_norm = self.train_step(batch, learning_rate)
        figures = StepFigures(
            finished,
            loss,
            grad_norm,
            learning_rate,
            data_wait,
            finished_at=time.perf_counter(),
            loss_scale=self.train_step.loss_scale,
        )
        try:
            figures.check()
        except NonFiniteError:
            self._save(finished - 1)
            raise
        return figures

    def _next_batch(self, batches: Iterator[tuple[int, Batch]], done: int) -> Batch:
        try:
            return next(batches)[1]
        except ValueError:
            # Saving is a common act, and the other processes are in the middle of their step.
            if self.accelerator.num_processes == 1:
                self._save(done)
            raise

    def _save(self, done: int) -> None:
        """Save before an error ends the run; a state without a step would hold nothing that the base model does not."""
        if done > 0:
            self.checkpoints.save(done, self.record)
