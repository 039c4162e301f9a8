"""Losses and images of held-out samples in PyTorch: the same figures however many processes share the work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.torch_trainer.tiny_training import (
    Batch,
    DiffusersTraining,
    Training,
    batch_of,
    slice_of,
    training_of,
)
from torch_trainer.evaluation.evaluator import Evaluator


@dataclass
class OneOfSeveral:
    """What an Evaluator asks of an accelerator, for one process of several: `gather` hands back its own share."""

    num_processes: int
    process_index: int

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@dataclass
class NamesItsImages:
    """A sampler whose pictures say which row they were made for."""

    calls: list[list[int]]

    def __call__(self, prompts: list[str], conditions_RHWC: np.ndarray, indices: list[int]) -> torch.Tensor:
        assert [int(prompt) for prompt in prompts] == indices == conditions_RHWC[:, 0, 0, 0].tolist()
        self.calls.append(indices)
        return torch.from_numpy(conditions_RHWC)


def evaluator_of(training: Training, accelerator: Any, sampler: Any = None) -> Evaluator:
    return Evaluator(accelerator, training.models, training.train_step.objective, sampler)


def held_out_batch(count: int) -> Batch:
    return slice_of(batch_of(count), 0)


def test_losses_are_those_of_single_samples(base_model: Path) -> None:
    """Without weights by timestep, so that they compare between runs with and without --snr_gamma."""
    training = training_of(base_model, snr_gamma=1.0)
    batch = held_out_batch(4)
    losses = evaluator_of(training, training.accelerator).models_in_training().per_sample_losses(batch)
    reference = DiffusersTraining(base_model, training.controlnet)
    expected = [reference.loss({name: array[[row]] for name, array in batch.items()}).item() for row in range(4)]
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_evaluating_leaves_no_trace_in_training(base_model: Path) -> None:
    figures = []
    for evaluates in (False, True):
        training = training_of(base_model)
        training.step(batch_of(2), 1e-3)
        if evaluates:
            evaluator_of(training, training.accelerator).models_in_training().per_sample_losses(held_out_batch(2))
            assert not any(param.grad.any() for param in training.controlnet.parameters())
        figures.append(training.step(batch_of(2, seed=1), 1e-3))
    assert figures[0] == figures[1]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_losses(base_model: Path, processes: int) -> None:
    training = training_of(base_model)
    batch = held_out_batch(4)
    whole = evaluator_of(training, OneOfSeveral(1, 0)).models_in_training().per_sample_losses(batch)
    shares = [
        evaluator_of(training, OneOfSeveral(processes, index)).models_in_training().per_sample_losses(batch)
        for index in range(processes)
    ]
    assert {len(share) for share in shares} == {4 // processes}
    np.testing.assert_allclose(np.concatenate(shares), whole, rtol=1e-5)


@pytest.mark.parametrize(("count", "processes"), [(1, 1), (3, 1), (3, 2), (5, 4), (1, 3), (8, 8)])
def test_processes_share_the_images(base_model: Path, count: int, processes: int) -> None:
    """Each makes as many as the others; together they have every image, in order."""
    training = training_of(base_model)
    conditions = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, axis=-1)
    sampler = NamesItsImages([])
    shares = []
    for index in range(processes):
        evaluator = evaluator_of(training, OneOfSeveral(processes, index), sampler)
        images = evaluator.models_in_training().sample_images([str(row) for row in range(count)], conditions)
        assert len(images) <= count
        shares.append(images)
    assert len({len(call) for call in sampler.calls}) == 1
    made = [row for call in sampler.calls for row in call]
    assert made[:count] == list(range(count))
    assert len(made) - count < processes
