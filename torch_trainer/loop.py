"""The loop of a run: take a batch, dispatch a step, look at the step before, and every so often validate or save."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.profiler import record_function

from shared.checkpoints.policy import last_save_may_fail
from shared.data.batches import Batch, BatchLoader
from shared.data.views import Size
from shared.evaluation.validation import ModelsInTraining, Validation
from shared.run.interruption import Interruption
from shared.run.log import NonFiniteError, RunLog, StepFigures
from shared.run.setup import Steps
from torch_trainer.checkpoints.safetensors_checkpoints import Checkpoints
from torch_trainer.profiling.profiler import Profiler
from torch_trainer.training.step import StepResult, TrainStep


@dataclass
class _Dispatched:
    """A step on its way on the device; its figures are read after the next one is dispatched."""

    step: int
    result: StepResult
    learning_rate: float
    data_wait: float
    loss_scale: float | None
    size: Size
    stop_requested: bool = False

    def figures(self) -> StepFigures:
        with record_function("wait_for_step"):
            loss, grad_norm, self.stop_requested = self.result.read()
        return StepFigures(
            step=self.step,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=self.learning_rate,
            data_wait=self.data_wait,
            finished_at=time.perf_counter(),
            loss_scale=self.loss_scale,
            size=self.size,
        )


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
        if first == last or self._lacks_validation(first):  # it was interrupted after that step
            self.profiler.before_validation(first)
            self.validation.measure_again(self.models, first)
            self._draw(first)
            self.log.restart_clock()
        pending: _Dispatched | None = None
        batches = self.loader.iterate(first)
        for step in range(first + 1, last + 1):
            before = pending
            self.profiler.before_step(step)
            pending = self._dispatch(step, batches, before, stop_requested=interruption.requested is not None)
            if before is not None:
                self.log.add(self._finished(before))
            traced = self.profiler.after_step(step)

            due = self.steps.due(step, interrupted=self._is_to_stop(interruption, before))
            if due.save or due.validate:
                self._save_and_validate(pending, save=due.save, validate=due.validate)
                pending = None
            elif traced:
                self.log.add(self._finished(pending), before_break=True)
                self.log.restart_clock()
                pending = None
            if due.stop:
                return step
        return last

    def _lacks_validation(self, first: int) -> bool:
        """The same in all processes."""
        if first == 0 or not self.steps.has_validation(first):
            return False
        return any(gather_object([self.validation.is_missing(first)]))

    def _is_to_stop(self, interruption: Interruption, before: _Dispatched | None) -> bool:
        """The same in all processes. Several of them learn from the figures of the step before, so without waiting."""
        if self.accelerator.num_processes == 1:
            return interruption.requested is not None
        return before is not None and before.stop_requested

    def _dispatch(
        self, step: int, batches: Iterator[tuple[int, Batch]], before: _Dispatched | None, *, stop_requested: bool
    ) -> _Dispatched:
        """Set a step going."""
        waiting_since = time.perf_counter()
        batch = self._next_batch(batches, step - 1, before)
        data_wait = time.perf_counter() - waiting_since
        learning_rate = self.steps.learning_rate(step - 1)
        result = self.train_step(batch, learning_rate, stop_requested=stop_requested)
        size = self.loader.size_of(step - 1)
        return _Dispatched(step, result, learning_rate, data_wait, self.train_step.loss_scale, size)

    def _next_batch(self, batches: Iterator[tuple[int, Batch]], done: int, before: _Dispatched | None) -> Batch:
        try:
            with record_function("data_wait"):
                return next(batches)[1]
        except ValueError:
            # Saving is a common act, and the other processes are in the middle of their step.
            if self.accelerator.num_processes == 1:
                if before is not None:
                    self.log.add(self._finished(before), before_break=True)
                self._save_before_error(done)
            raise

    def _finished(self, dispatched: _Dispatched) -> StepFigures:
        """Wait for a step; where it went wrong, save what was last good before raising."""
        figures = dispatched.figures()
        try:
            figures.check()
        except NonFiniteError:
            self._save_before_error(dispatched.step - 1)
            raise
        return figures

    def _save_and_validate(self, dispatched: _Dispatched, *, save: bool, validate: bool) -> None:
        figures, step = self._finished(dispatched), dispatched.step
        if validate:
            self.profiler.before_validation(step)
        # Before saving: a step that a killed run's checkpoint contains is then also in its log.
        evaluation = self.validation.measure(self.models, step) if validate else None
        self.log.add(figures, evaluation, before_break=True)
        if save:
            with last_save_may_fail(step == self.steps.last):
                self.checkpoints.save(step, self.steps.record)
        if validate:
            self._draw(step)
        self.log.restart_clock()

    def _draw(self, step: int) -> None:
        self.validation.draw(self.models, step)
        self.profiler.after_validation(step)

    def _save_before_error(self, done: int) -> None:
        """A state without a step would hold nothing that the base model does not."""
        if done > 0:
            self.checkpoints.save(done, self.steps.record)
