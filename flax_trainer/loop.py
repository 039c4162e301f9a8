"""The loop of a run: take a batch, dispatch a step, look at the step before, and every so often validate or save."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints
from flax_trainer.distributed.engine import Engine
from flax_trainer.distributed.processes import CommonRequest
from flax_trainer.evaluation.evaluator import Evaluator
from flax_trainer.profiling.profiler import Profiler
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import FrozenParams, Metrics, TrainStep
from shared.config import TrainConfig
from shared.config.learning_rate import LearningRateSchedule
from shared.data.batches import Batch, BatchLoader
from shared.evaluation.validation import Validation
from shared.run.interruption import Interruption
from shared.run.log import NonFiniteError, RunLog, StepFigures
from shared.tracking.sparing import result_comes_first


@dataclass
class _Dispatched:
    """A step on its way on the devices; its metrics are fetched after the next one is dispatched."""

    step: int
    metrics: Metrics
    learning_rate: float
    data_wait: float
    host_to_device: float

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
        )


@dataclass(frozen=True)
class Loop:
    """Everything the loop uses. `record` goes into every checkpoint."""

    config: TrainConfig
    engine: Engine
    train_step: TrainStep
    frozen: FrozenParams
    loader: BatchLoader
    learning_rate: LearningRateSchedule
    checkpoints: Checkpoints
    record: dict[str, Any]
    validation: Validation
    evaluator: Evaluator
    log: RunLog
    profiler: Profiler

    def run(self, state: TrainState, first_step: int, last_step: int, interruption: Interruption) -> TrainState:
        """Steps `first_step` … `last_step - 1`; ends early, with a checkpoint, when any process is interrupted.

        Raises:
            NonFiniteError: after saving the last good state.
            UserError: from the data, after saving the state that it stopped at.
        """
        if first_step == last_step:  # interrupted after the last step, before its validation
            models = self.evaluator.at(state.result)
            self.profiler.before_validation(last_step)
            self.validation.measure_again(models, last_step)
            self.validation.draw(models, last_step)
            self.profiler.after_validation(last_step)
        dispatched: _Dispatched | None = None
        to_stop = CommonRequest()
        batches = self.loader.iterate(first_step)
        for finished in range(first_step + 1, last_step + 1):
            self.profiler.before_step(finished, state)
            previous = dispatched
            state, dispatched = self._dispatch(finished, state, batches)
            self.profiler.after_step(finished, state)
            if previous is not None:
                self.log.add(self._finished(previous, state))

            last, interrupted = finished == last_step, to_stop.heard(interruption.requested is not None)
            save = finished % self.config.checkpointing_steps == 0 or interrupted
            validate = last or (finished % self.config.validation_steps == 0 and not interrupted)
            if save or validate:
                figures, dispatched = self._finished(dispatched, state), None
                models = self.evaluator.at(state.result)
                if validate:
                    self.profiler.before_validation(finished)
                # Before saving: a step that a killed run's checkpoint contains is then also in its log.
                self.log.add(figures, self.validation.measure(models, finished) if validate else None)
                if save:
                    with result_comes_first(last):
                        self.checkpoints.save(self.engine.to_save(state), self.record)
                if validate:
                    self.validation.draw(models, finished)
                    self.profiler.after_validation(finished)
                self.log.restart_clock()
            if interrupted and not last:
                break
        else:
            last = True
        with result_comes_first(last):
            self.checkpoints.wait()
        return state

    def _dispatch(
        self, step: int, state: TrainState, batches: Iterator[tuple[int, Batch]]
    ) -> tuple[TrainState, _Dispatched]:
        """Set a step going, named in a profile as what it does on the host."""
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            waiting_since = time.perf_counter()
            batch = self._next_batch(batches, state)
            copying_since = time.perf_counter()
            with jax.profiler.TraceAnnotation("host_to_device"):
                placed = self.engine.place_batch(batch)
            copied_at = time.perf_counter()
            learning_rate = self.learning_rate(step - 1)
            state, metrics = self.train_step(state, self.frozen, placed, np.float32(learning_rate))
        data_wait, host_to_device = copying_since - waiting_since, copied_at - copying_since
        return state, _Dispatched(step, metrics, learning_rate, data_wait, host_to_device)

    def _next_batch(self, batches: Iterator[tuple[int, Batch]], state: TrainState) -> Batch:
        try:
            with jax.profiler.TraceAnnotation("data_wait"):
                return next(batches)[1]
        except ValueError:
            # Saving is a common act, and the other processes are in the middle of their step.
            if jax.process_count() == 1:
                self._save(state)
            raise

    def _finished(self, dispatched: _Dispatched, state: TrainState) -> StepFigures:
        """Wait for a step; where it went wrong, save what was last good before raising."""
        figures = dispatched.figures(self.engine)
        try:
            figures.check()
        except NonFiniteError:
            self._save(state)
            raise
        return figures

    def _save(self, state: TrainState) -> None:
        """Save before an error ends the run; a state without a step would hold nothing that the base model does not."""
        if self.engine.fetch(state.step) > 0:
            self.checkpoints.save(self.engine.to_save(state), self.record)
            self.checkpoints.wait()
