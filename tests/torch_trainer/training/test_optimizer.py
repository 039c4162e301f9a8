"""The optimizers that PyTorch runs choose from: AdamW and 8-bit AdamW."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import TrainConfig
from tests.torch_trainer.tiny_training import batch_of, relative_difference, training_of
from torch_trainer.training.optimizer import make_optimizer

SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "adam_weight_decay": 0.05,
}
EIGHT_BIT_FROM = 4096  # elements; bitsandbytes keeps smaller tensors' moments in 32 bits


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(8, 4)


@pytest.mark.parametrize("use_8bit_adam", [False, True])
def test_the_settings_arrive(use_8bit_adam: bool) -> None:
    optimizer = make_optimizer(TrainConfig(use_8bit_adam=use_8bit_adam, **SETTINGS), small_model().parameters())
    (group,) = optimizer.param_groups
    assert group["lr"] == 3e-4
    assert tuple(group["betas"]) == (0.8, 0.95)
    assert group["eps"] == 1e-6
    assert group["weight_decay"] == 0.05
    assert len(group["params"]) == 2


@pytest.mark.parametrize("use_8bit_adam", [False, True])
def test_steps_are_adamws(use_8bit_adam: bool) -> None:
    """Loshchilov & Hutter 2019, algorithm 2, in float64. Tensors this small have 32-bit moments in either."""
    model = small_model()
    optimizer = make_optimizer(TrainConfig(use_8bit_adam=use_8bit_adam, **SETTINGS), model.parameters())
    expected = model.weight.detach().double()
    mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 4):
        gradient = torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(step))
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros_like(model.bias)
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.95 * square + 0.05 * gradient.double() ** 2
        direction = (mean / (1 - 0.8**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-6)
        expected = expected - 3e-4 * 0.05 * expected - 3e-4 * direction
    assert relative_difference(model.weight.detach(), expected) < 1e-6


def test_8_bit_adam_learns_and_keeps_its_moments_in_8_bits(base_model: Path) -> None:
    training = training_of(base_model, use_8bit_adam=True)
    batch = batch_of(2)
    losses = [training.step(batch, 2e-3)[0] for _ in range(8)]
    assert losses[-1] < 0.95 * losses[0]
    large = small = 0
    for param in training.controlnet.parameters():
        kinds = {kind: value for kind, value in training.optimizer.state[param].items() if kind.startswith("state")}
        if param.numel() >= EIGHT_BIT_FROM:
            large += 1
            assert {value.dtype for value in kinds.values()} == {torch.uint8}
        else:
            small += 1
            assert {value.dtype for value in kinds.values()} == {torch.float32}
        assert [value.shape for value in kinds.values()] == [param.shape] * 2
    assert large > 10
    assert small > 10


def test_8_bit_adam_takes_nearly_the_steps_of_adamw(base_model: Path) -> None:
    after = {}
    for use_8bit_adam in (False, True):
        training = training_of(base_model, use_8bit_adam=use_8bit_adam)
        before = training.state.params()
        before = {name: value.clone() for name, value in before.items()}
        for seed in range(4):
            training.step(batch_of(2, seed), 1e-3)
        after[use_8bit_adam] = {name: value - before[name] for name, value in training.state.params().items()}
    exact, rounded = (torch.cat([change.flatten() for change in after[key].values()]) for key in (False, True))
    assert 0 < relative_difference(rounded, exact) < 0.2


def test_8_bit_adam_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(ValueError, match=r"--use_8bit_adam needs the bitsandbytes package.*pip install bitsandbytes"):
        make_optimizer(TrainConfig(use_8bit_adam=True), small_model().parameters())
