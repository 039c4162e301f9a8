"""Finished runs made up for tests, in the layout that both backends leave behind."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from shared.config import TrainConfig, to_yaml

LOSSES = (0.5, 0.25, 0.125)

WEIGHTS = {
    "conv_in.weight": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 2, 2),
    "conv_in.bias": np.array([0.5, -0.5], np.float32),
    "down_blocks.0.resnets.0.conv1.weight": np.linspace(0, 3, 9, dtype=np.float32).reshape(3, 3),
    "down_blocks.1.resnets.0.conv1.weight": np.full((4,), 2.0, np.float32),
    "controlnet_mid_block.weight": np.array([1e-3, -2e-3], np.float32),
}

Weights = dict[str, np.ndarray]


def make_run(
    folder: Path,
    *,
    losses: Sequence[float | None] = LOSSES,
    weights: Weights = WEIGHTS,
    report: dict[str, Any] | None = None,
    evaluations: Sequence[dict[str, float]] = (),
    **config: Any,
) -> Path:
    """A run of one step per loss. `report` and `config` replace single values, `evaluations` are further metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"generated_circles": 8, "train_batch_size": 2, "output_dir": str(folder)} | config
    (folder / "config.yaml").write_text(to_yaml(TrainConfig(**settings)))
    entries = [*evaluations, *(_entry(step, loss) for step, loss in enumerate(losses, start=1))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    figures = {
        "steps": len(losses),
        "global_batch_size": 2,
        "images_seen": 2 * len(losses),
        "seconds_total": 75.2,
        "devices": "1 × cpu",
        "backend": "flax",
        "versions": {"python": "3.11.7"},
        "command": "python3 train_flax.py",
        "peak_host_memory_gib": 1.5,
        "peak_device_memory_gib": None,
    }
    (folder / "report.json").write_text(json.dumps(figures | (report or {})))
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_picture(path: Path, value: int) -> Path:
    """A picture of one grey, of 6 by 4 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(path)
    return path


def scaled(weights: Weights, factor: float) -> Weights:
    """Every value times a factor: a relative difference of |factor - 1| for a factor near 1."""
    return {name: (value.astype(np.float64) * factor).astype(np.float32) for name, value in weights.items()}


def _entry(step: int, loss: float | None) -> dict[str, float | None]:
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 0.1 * step,
        "learning_rate": 1e-5,
        "images_per_second": 10.0 * step,
        "data_wait": 0.01,
    }
