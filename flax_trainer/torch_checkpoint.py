"""Continuing a run that the PyTorch backend began."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_trainer.loss_scaling import LossScaler
from flax_trainer.models.adapter import from_torch_layout
from flax_trainer.state import TrainState
from shared.portable_checkpoint import (
    STATE_FILE,
    read_average,
    read_optimizer_state,
    read_params,
    read_training_state,
)

_MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}


def is_torch_checkpoint(checkpoint: Path) -> bool:
    """Whether the PyTorch backend wrote this checkpoint."""
    return (checkpoint / STATE_FILE).is_file()


def read_torch_checkpoint(checkpoint: Path, layouts: Mapping[str, str]) -> tuple[TrainState, dict[str, Any]]:
    """The state, in Flax's layouts, and what the checkpoint says about the run it belongs to.

    `layouts` are those of the trained parameters. Parameters that it does not know keep the layout they have: the
    caller compares the state with what it expects.

    Raises:
        ValueError: it is damaged, or holds the optimizer's state in another form than whole float32 moments.
    """
    saved = read_training_state(checkpoint)

    def in_our_layout(name: str, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(from_torch_layout(array, layouts[name])) if name in layouts else array

    params = {name: in_our_layout(name, array) for name, array in read_params(checkpoint)}
    moments: dict[str, dict[str, np.ndarray]] = {"mu": {}, "nu": {}}
    for kind, name, array in read_optimizer_state(checkpoint):
        if kind not in _MOMENTS:
            raise ValueError(
                f"{checkpoint} was saved with --use_8bit_adam, whose state only that optimizer can read. Resume it "
                "with the PyTorch backend and that flag."
            )
        moments[_MOMENTS[kind]][name] = in_our_layout(name, array)
    step = np.array(saved["step"], np.int32)
    loss_scaler = _loss_scaler(saved["loss_scaler"])
    ema = {name: in_our_layout(name, array) for name, array in read_average(checkpoint)}
    return TrainState(step, params, moments["mu"], moments["nu"], np.array(False), loss_scaler, ema), saved["record"]


def _loss_scaler(saved: dict[str, Any] | None) -> LossScaler:
    """From the state of a `torch.amp.GradScaler`; empty where there was none, or one that was off."""
    if not saved:
        return {}
    return {
        "scale": np.array(saved["scale"], np.float32),
        "growth_tracker": np.array(saved["_growth_tracker"], np.int32),
    }
