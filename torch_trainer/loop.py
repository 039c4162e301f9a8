"""The loop of a run: take a batch, dispatch a step, look at the step before, and every so often validate or save."""

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.profiler import record_function

from shared.checkpoints.policy import last_save_may_fail
from shared.data.batches import Batch
from shared.data.joint_batches import JointBatches
from shared.data.views import Size
from shared.evaluation.validation import ModelsInTraining, Validation
from shared.run.interruption import Interruption
from shared.run.log import NonFiniteError, RunLog, StepFigures
from shared.run.requests import NO_REQUESTS, Requests, SavingClock
from shared.run.setup import Due, Steps
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
    asked: Requests = NO_REQUESTS

    def figures(self) -> StepFigures:
        with record_function("wait_for_step"):
            loss, grad_norm, self.asked = self.result.read()
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
    batches: JointBatches
    checkpoints: Checkpoints
    clock: SavingClock
    validation: Validation
    models: ModelsInTraining
    log: RunLog
    profiler: Profiler

    def run(self, interruption: Interruption) -> int:
        """The steps of the run; ends early, with a checkpoint, when any process is interrupted.

        Returns the number of steps that are done.

        Raises:
            NonFiniteError: after saving the last good state.
            UserError: from the data of this process or another, after saving the state that it stopped at.
        """
        first, last = self.steps.first, self.steps.last
        step = first
        if first == last or self._lacks_validation(first):  # it was interrupted after that step
            self.profiler.before_validation(first)
            self.validation.measure_again(self.models, first)
            self._draw(first)
            self.log.restart_clock()
        self.clock.restart()
        pending: _Dispatched | None = None
        last_read: _Dispatched | None = None
        for step in range(first + 1, last + 1):
            before = pending
            self.profiler.before_step(step)
            is_alone = self.accelerator.num_processes == 1
            asked_here = NO_REQUESTS if is_alone else self._asked_here(step, interruption)
            pending = self._dispatch(step, before, asked_here)
            if before is not None:
                self.log.add(self._finished(before))
                last_read = before
            traced = self.profiler.after_step(step)

            # Several processes hear with the figures of the step before, so without waiting.
            asked = NO_REQUESTS if last_read is None else last_read.asked
            due = self.steps.due(step, self._asked_here(step, interruption) if is_alone else asked)
            if due.save or due.validate:
                self._save_and_validate(pending, due)
                last_read, pending = pending, None
            elif traced:
                self.log.add(self._finished(pending), before_break=True)
                self.log.restart_clock()
                last_read, pending = pending, None
            if due.stop:
                break
        with last_save_may_fail(step == last):
            self.checkpoints.wait()
        return step

    def _lacks_validation(self, first: int) -> bool:
        """The same in all processes."""
        if first == 0 or not self.steps.has_validation(first):
            return False
        return self._in_any_process(self.validation.is_missing(first))

    def _asked_here(self, step: int, interruption: Interruption) -> Requests:
        return Requests(
            stop=interruption.requested is not None, save=not self.steps.is_saved(step) and self.clock.asks()
        )

    def _dispatch(self, step: int, before: _Dispatched | None, asked_here: Requests) -> _Dispatched:
        """Set a step going."""
        waiting_since = time.perf_counter()
        batch = self._next_batch(step, before)
        data_wait = time.perf_counter() - waiting_since
        learning_rate = self.steps.learning_rate(step - 1)
        result = self.train_step(batch, learning_rate, asked_here)
        size = self.batches.size_of(step - 1)
        return _Dispatched(step, result, learning_rate, data_wait, self.train_step.loss_scale, size)

    def _next_batch(self, step: int, before: _Dispatched | None) -> Batch:
        try:
            with record_function("data_wait"):
                return self.batches.next(step - 1)
        except ValueError:
            if before is not None:
                self.log.add(self._finished(before), before_break=True)
            self._save_before_error(step - 1)
            raise

    def _finished(self, dispatched: _Dispatched) -> StepFigures:
        """Wait for a step; where it went wrong, save what was last good before raising."""
        figures = dispatched.figures()
        try:
            figures.check()
        except NonFiniteError:
            is_good = self.train_step.keeps_what_was_good
            if is_good:
                self._save_before_error(dispatched.step - 1)
            if self._in_any_process(self.batches.have_failed(dispatched.step)):
                raise self.batches.failure(dispatched.step, is_saved=is_good) from None
            raise
        return figures

    def _in_any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, reduction="sum").item())

    def _save_and_validate(self, dispatched: _Dispatched, due: Due) -> None:
        figures, step = self._finished(dispatched), dispatched.step
        if due.validate:
            self.profiler.before_validation(step)
        # Before saving: a step that a killed run's checkpoint contains is then also in its log.
        evaluation = self.validation.measure(self.models, step) if due.validate else None
        self.log.add(figures, evaluation, before_break=True)
        if due.save:
            self.clock.restart()
            with last_save_may_fail(step == self.steps.last):
                self.checkpoints.save(step, self.steps.record, timed=due.is_timed)
        if due.validate:
            self._draw(step)
        self.log.restart_clock()

    def _draw(self, step: int) -> None:
        self.validation.draw(self.models, step)
        self.profiler.after_validation(step)

    def _save_before_error(self, done: int) -> None:
        """A state without a step would hold nothing that the base model does not."""
        if done > 0:
            self.checkpoints.save(done, self.steps.record)
            self.checkpoints.wait()
