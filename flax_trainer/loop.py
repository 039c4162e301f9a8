"""The loop of a run: take a batch, dispatch a step, look at the step before, and every so often validate or save."""

import time
from dataclasses import dataclass

import jax
import numpy as np

from flax_trainer.base_models import FrozenParams
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints
from flax_trainer.compilation import CompiledAhead
from flax_trainer.distributed.engine import Engine
from flax_trainer.distributed.processes import JointRequests, any_process, barrier
from flax_trainer.evaluation.evaluator import Evaluator
from flax_trainer.profiling.profiler import Profiler
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import Metrics
from shared.checkpoints.policy import last_save_may_fail
from shared.data.batches import Batch
from shared.data.joint_batches import JointBatches
from shared.data.views import Size
from shared.evaluation.validation import ModelsInTraining, Validation
from shared.run.interruption import Interruption
from shared.run.log import NonFiniteError, RunLog, StepFigures
from shared.run.requests import Requests, SavingClock
from shared.run.setup import Due, Steps


@dataclass
class _Dispatched:
    """A step on its way on the devices; its metrics are fetched after the next one is dispatched."""

    step: int
    metrics: Metrics
    learning_rate: float
    data_wait: float
    host_to_device: float
    size: Size

    def figures(self, engine: Engine) -> StepFigures:
        with jax.profiler.TraceAnnotation("wait_for_step"):
            metrics = engine.fetch(self.metrics)
        return StepFigures(
            step=self.step,
            loss=float(metrics["loss"]),
            grad_norm=float(metrics["grad_norm"]),
            learning_rate=self.learning_rate,
            data_wait=self.data_wait,
            finished_at=time.perf_counter(),
            loss_scale=float(metrics["loss_scale"]) if "loss_scale" in metrics else None,
            host_to_device=self.host_to_device,
            size=self.size,
        )


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Everything the loop uses."""

    steps: Steps
    engine: Engine
    train_step: CompiledAhead
    frozen: FrozenParams
    batches: JointBatches
    checkpoints: Checkpoints
    clock: SavingClock
    validation: Validation
    evaluator: Evaluator
    log: RunLog
    profiler: Profiler

    def run(self, state: TrainState, interruption: Interruption) -> TrainState:
        """The steps of the run; ends early, with a checkpoint, when any process is interrupted.

        Raises:
            NonFiniteError: after saving the last good state.
            UserError: from the data of this process or another, after saving the state that it stopped at.
        """
        first, last = self.steps.first, self.steps.last
        step = first
        if first == last or self._lacks_validation(first):  # it was interrupted after that step
            models = self.evaluator.models_in_training(state.result)
            self.profiler.before_validation(first)
            self.validation.measure_again(models, first)
            self._draw(models, first)
            self.log.restart_clock()
        pending: _Dispatched | None = None
        requests = JointRequests()
        self.clock.restart()
        for step in range(first + 1, last + 1):
            self.profiler.before_step(step, state)
            before = pending
            state, pending = self._dispatch(step, state, before)
            self.profiler.after_step(step, state)
            if before is not None:
                self.log.add(self._finished(before, state))

            due = self.steps.due(step, requests.poll(self._asked_here(step, interruption)))
            if due.save or due.validate:
                self._save_and_validate(pending, state, due)
                pending = None
            if due.stop:
                break
        with last_save_may_fail(step == last):
            self.checkpoints.wait()
        return state

    def _lacks_validation(self, first: int) -> bool:
        """The same in all processes."""
        if first == 0 or not self.steps.has_validation(first):
            return False
        return any_process(self.validation.is_missing(first))

    def _asked_here(self, step: int, interruption: Interruption) -> Requests:
        return Requests(
            stop=interruption.requested is not None, save=not self.steps.is_saved(step) and self.clock.asks()
        )

    def _dispatch(self, step: int, state: TrainState, before: _Dispatched | None) -> tuple[TrainState, _Dispatched]:
        """Set a step going, named in a profile as what it does on the host."""
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            waiting_since = time.perf_counter()
            batch = self._next_batch(step, state, before)
            copying_since = time.perf_counter()
            with jax.profiler.TraceAnnotation("host_to_device"):
                placed = self.engine.place_batch(batch)
            copied_at = time.perf_counter()
            learning_rate, size = self.steps.learning_rate(step - 1), self.batches.size_of(step - 1)
            state, metrics = self.train_step(state, self.frozen, placed, np.float32(learning_rate), size=size)
        data_wait, host_to_device = copying_since - waiting_since, copied_at - copying_since
        return state, _Dispatched(step, metrics, learning_rate, data_wait, host_to_device, size)

    def _next_batch(self, step: int, state: TrainState, before: _Dispatched | None) -> Batch:
        try:
            with jax.profiler.TraceAnnotation("data_wait"):
                return self.batches.next(step - 1)
        except ValueError:
            if before is not None:
                self.log.add(self._finished(before, state), before_break=True)
            self._save_before_error(state)
            raise

    def _finished(self, dispatched: _Dispatched, state: TrainState) -> StepFigures:
        """Wait for a step; where it went wrong, save what was last good before raising."""
        figures = dispatched.figures(self.engine)
        try:
            figures.check()
        except NonFiniteError:
            self._save_before_error(state)
            if any_process(self.batches.have_failed(dispatched.step)):
                raise self.batches.failure(dispatched.step) from None
            raise
        return figures

    def _save_and_validate(self, dispatched: _Dispatched, state: TrainState, due: Due) -> None:
        figures, step = self._finished(dispatched, state), dispatched.step
        models = self.evaluator.models_in_training(state.result)
        if due.validate:
            self.profiler.before_validation(step)
        # Before saving: a step that a killed run's checkpoint contains is then also in its log.
        self.log.add(figures, self.validation.measure(models, step) if due.validate else None, before_break=True)
        if due.save:
            self.clock.restart()
            with last_save_may_fail(step == self.steps.last):
                self.checkpoints.save(self.engine.to_save(state), self.steps.record, timed=due.is_timed)
        if due.validate:
            self._draw(models, step)
        self.log.restart_clock()

    def _draw(self, models: ModelsInTraining, step: int) -> None:
        self.validation.draw(models, step)
        self.profiler.after_validation(step)

    def _save_before_error(self, state: TrainState) -> None:
        """A state without a step would hold nothing that the base model does not."""
        if self.engine.fetch(state.step) > 0:
            self.checkpoints.save(self.engine.to_save(state), self.steps.record)
            self.checkpoints.wait()
        barrier("what was last good is saved")  # before one of them ends
