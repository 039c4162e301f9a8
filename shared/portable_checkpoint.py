"""The PyTorch backend's checkpoints, in files that either backend reads and that hold nothing but numbers.

checkpoint-N/
  controlnet/              config.json and weights, in diffusers' layout
  unet_decoder.safetensors with --sd_unlocked, the trained part of the UNet, under `unet.NAME`
  optimizer.safetensors    the optimizer's state: `exp_avg.NAME`, `exp_avg_sq.NAME`, … for every parameter NAME
  average.safetensors      with --use_ema, the moving average of every trained parameter, under its name
  training_state.json      the step, the loss scaler, and what the checkpoint belongs to
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from shared.model_files.weight_files import DIFFUSERS, read_weights

CONTROLNET_FOLDER = "controlnet"
DECODER_FILE = "unet_decoder.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "average.safetensors"
STATE_FILE = "training_state.json"


def read_training_state(checkpoint: Path) -> dict[str, Any]:
    """`step`, `record` and `loss_scaler` (None where there was none).

    Raises:
        ValueError: the file is damaged.
    """
    path = checkpoint / STATE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Resume from another checkpoint.") from error


def read_params(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, value) of every trained parameter.

    Raises:
        ValueError: the weights are damaged or not there.
    """
    folder = checkpoint / CONTROLNET_FOLDER
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist. Resume from another checkpoint.")
    yield from read_weights(folder, DIFFUSERS, None)
    if (checkpoint / DECODER_FILE).exists():
        yield from _read_arrays(checkpoint / DECODER_FILE)


def read_optimizer_state(checkpoint: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """(kind, parameter, value) of every array of the optimizer's state; kind is `exp_avg` and the like.

    Raises:
        ValueError: the file is damaged.
    """
    for name, value in _read_arrays(checkpoint / OPTIMIZER_FILE):
        kind, _, parameter = name.partition(".")
        yield kind, parameter, value


def read_average(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, value) of the moving average of every parameter; nothing where the run keeps none.

    Raises:
        ValueError: the file is damaged.
    """
    if (checkpoint / AVERAGE_FILE).exists():
        yield from _read_arrays(checkpoint / AVERAGE_FILE)


def _read_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Resume from another checkpoint.") from error
