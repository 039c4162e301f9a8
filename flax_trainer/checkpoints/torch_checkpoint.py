"""Continuing a run that the PyTorch backend began."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_trainer.checkpoints.orbax_checkpoints import check_moments
from flax_trainer.models.params import from_torch_layout, torch_shape
from flax_trainer.training.loss_scaling import LossScaler
from flax_trainer.training.state import TrainState
from shared.checkpoints.portable import (
    FLAX_MOMENTS,
    STATE_FILE,
    SavedLossScaler,
    check_arrays,
    is_saved_with_8_bits,
    read_8_bit_moments,
    read_average,
    read_optimizer_state,
    read_params,
    read_training_state,
    shapes_of_params,
)


def is_torch_checkpoint(checkpoint: Path) -> bool:
    """Whether the PyTorch backend wrote this checkpoint."""
    return os.path.isfile(checkpoint / STATE_FILE)


def read_torch_record(checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint says about the run it belongs to.

    Raises:
        UserError: it is damaged.
    """
    return {**read_training_state(checkpoint)["record"]}


def read_torch_checkpoint(
    checkpoint: Path, layouts: Mapping[str, str], like: TrainState | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """The state, in Flax's layouts, and what the checkpoint says about the run it belongs to.

    `layouts` are those of the trained parameters. Parameters that it does not know keep the layout they have. `like`
    gives the names and shapes expected, which are compared before any array is read; without it, the caller compares
    the state. Moments in eight bits are rounded anew, for the backends cut them into blocks of different numbers.

    Raises:
        UserError: it is damaged, holds other parameters than `like`, or stores the optimizer's moments otherwise.
    """
    saved = read_training_state(checkpoint)
    in_eight_bits = is_saved_with_8_bits(checkpoint)
    if like is not None:
        check_moments(checkpoint, in_eight_bits=in_eight_bits, like=like)
    check_arrays(checkpoint, shapes_of_params(checkpoint) if like is None else _torch_shapes(like, layouts))

    def in_our_layout(name: str, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(from_torch_layout(array, layouts[name])) if name in layouts else array

    params = {name: in_our_layout(name, array) for name, array in read_params(checkpoint)}
    moments: dict[str, dict[str, np.ndarray]] = {"mu": {}, "nu": {}}
    read_moments = read_8_bit_moments if in_eight_bits else read_optimizer_state
    for kind, name, array in read_moments(checkpoint):
        moments[FLAX_MOMENTS[kind]][name] = in_our_layout(name, array)
    step = np.array(saved["step"], np.int32)
    loss_scaler = _loss_scaler(saved["loss_scaler"])
    ema = {name: in_our_layout(name, array) for name, array in read_average(checkpoint)}
    state = TrainState(step, params, moments["mu"], moments["nu"], np.array(False), loss_scaler, ema)
    return state.with_moments_in_eight_bits() if in_eight_bits else state, {**saved["record"]}


def _torch_shapes(like: TrainState, layouts: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    return {name: torch_shape(value.shape, layouts[name]) for name, value in like.params.items()}


def _loss_scaler(saved: SavedLossScaler | None) -> LossScaler:
    """From the state of a `torch.amp.GradScaler`; empty where there was none, or one that was off."""
    if not saved:
        return {}
    return {
        "scale": np.array(saved["scale"], np.float32),
        "growth_tracker": np.array(saved["_growth_tracker"], np.int32),
    }
