"""The loop of a run: take a batch, take a step, and every so often validate or save."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from accelerate import Accelerator
from torch.profiler import record_function

from shared.checkpoints.policy import last_save_may_fail
from shared.data.batches import Batch, BatchLoader
from shared.evaluation.validation import ModelsInTraining, Validation
from shared.run.interruption import Interruption
from shared.run.log import NonFiniteError, RunLog, StepFigures
from shared.run.setup import Steps
from torch_trainer.checkpoints.safetensors_checkpoints import Checkpoints
from torch_trainer.distributed.accelerator import any_process
from torch_trainer.profiling.profiler import Profiler
from torch_trainer.training.step import TrainStep


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Everything the loop uses."""

    steps: Steps
    accelerator: Accelerator
    train_step: TrainStep
    loader: BatchLoader
    checkpoints: Checkpoints
    validation: Validation
    models: ModelsInTraining
    log: RunLog
    profiler: Profiler

    def run(self, interruption: Interruption) -> int:
        """The steps of the run; ends early, with a checkpoint, when any process is interrupted.

        Returns the number of steps that are done.

        Raises:
            NonFiniteError: after saving the last good state.
            UserError: from the data, after saving the state that it stopped at.
        """
        first, last = self.steps.first, self.steps.last
        if first == last:  # interrupted after the last step, before its validation
            self.profiler.before_validation(last)
            self.validation.measure_again(self.models, last)
            self._draw(last)
        batches = self.loader.iterate(first)
        for step in range(first + 1, last + 1):
            self.profiler.before_step(step)
            figures = self._step(batches, step)
            traced = self.profiler.after_step(step)
            interrupted = any_process(self.accelerator, interruption.requested is not None)
            due = self.steps.due(step, interrupted=interrupted)
            if due.validate:
                self.profiler.before_validation(step)
            # Before saving: a step that a killed run's checkpoint contains is then also in its log.
            evaluation = self.validation.measure(self.models, step) if due.validate else None
            self.log.add(figures, evaluation, before_break=due.save or due.validate or traced)
            if due.save:
                with last_save_may_fail(step == last):
                    self.checkpoints.save(step, self.steps.record)
            if due.validate:
                self._draw(step)
            if due.save or due.validate or traced:
                self.log.restart_clock()
            if due.stop:
                return step
        return last

    def _draw(self, step: int) -> None:
        self.validation.draw(self.models, step)
        self.profiler.after_validation(step)

    def _step(self, batches: Iterator[tuple[int, Batch]], step: int) -> StepFigures:
        waiting_since = time.perf_counter()
        batch = self._next_batch(batches, step - 1)
        data_wait = time.perf_counter() - waiting_since
        learning_rate = self.steps.learning_rate(step - 1)
        loss, grad_norm = self.train_step(batch, learning_rate)
        figures = StepFigures(
            step,
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
            self._save_before_error(step - 1)
            raise
        return figures

    def _next_batch(self, batches: Iterator[tuple[int, Batch]], done: int) -> Batch:
        try:
            with record_function("data_wait"):
                return next(batches)[1]
        except ValueError:
            # Saving is a common act, and the other processes are in the middle of their step.
            if self.accelerator.num_processes == 1:
                self._save_before_error(done)
            raise

    def _save_before_error(self, done: int) -> None:
        """A state without a step would hold nothing that the base model does not."""
        if done > 0:
            self.checkpoints.save(done, self.steps.record)
