"""The loop of a run: take a batch, dispatch a step, look at the step before, and every so often validate or save."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_trainer.checkpoints import Checkpoints
from flax_trainer.pmap_engine import fetch, shard_batch
from flax_trainer.state import TrainState
from flax_trainer.step import FrozenParams, Metrics, TrainStep
from flax_trainer.validation import Validation
from shared.config import TrainConfig
from shared.data.batches import BatchLoader
from shared.interruption import Interruption
from shared.learning_rate import LearningRateSchedule
from shared.run_log import NonFiniteError, RunLog, StepFigures


@dataclass
class _Dispatched:
    """A step on its way on the devices; its metrics are fetched after the next one is dispatched."""

    step: int
    metrics: Metrics
    learning_rate: float
    data_wait: float

    def figures(self) -> StepFigures:
        metrics = fetch(self.metrics)
        return StepFigures(
            self.step, float(metrics["loss"]), float(metrics["grad_norm"]), self.learning_rate, self.data_wait
        )


@dataclass(frozen=True)
class Loop:
    """Everything the loop uses. `validation` is None where none was asked for; `record` goes into every checkpoint."""

    config: TrainConfig
    train_step: TrainStep
    frozen: FrozenParams
    loader: BatchLoader
    learning_rate: LearningRateSchedule
    checkpoints: Checkpoints
    record: dict[str, Any]
    validation: Validation | None
    log: RunLog

    def run(self, state: TrainState, first_step: int, last_step: int, interruption: Interruption) -> TrainState:
        """Steps `first_step` … `last_step - 1`; ends early, with a checkpoint, when interrupted.

        Raises:
            NonFiniteError: after saving the last good state.
        """
        dispatched: _Dispatched | None = None
        batches = self.loader.iterate(first_step)
        for finished in range(first_step + 1, last_step + 1):
            waiting_since = time.perf_counter()
            _, batch = next(batches)
            data_wait = time.perf_counter() - waiting_since
            learning_rate = self.learning_rate(finished - 1)
            state, metrics = self.train_step(state, self.frozen, shard_batch(batch), np.float32(learning_rate))
            previous, dispatched = dispatched, _Dispatched(finished, metrics, learning_rate, data_wait)
            if previous is not None:
                self._look_at(previous, state)

            stop = finished == last_step or interruption.requested is not None
            save = finished % self.config.checkpointing_steps == 0 or interruption.requested is not None
            validate = finished % self.config.validation_steps == 0 or finished == last_step
            if save or validate or stop:
                self._look_at(dispatched, state)
                dispatched = None
            if save:
                self.checkpoints.save(fetch(state), self.record)
            if validate and self.validation is not None and interruption.requested is None:
                self.validation.run(state.params, self.frozen, finished)
            if save or validate:
                self.log.restart_clock()
            if stop:
                break
        self.checkpoints.wait()
        return state

    def _look_at(self, dispatched: _Dispatched, state: TrainState) -> None:
        try:
            self.log.add(dispatched.figures())
        except NonFiniteError:
            self.checkpoints.save(fetch(state), self.record)
            self.checkpoints.wait()
            raise
