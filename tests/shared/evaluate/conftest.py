"""Evaluations of the smallest models: a brush draws in their place."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image
from safetensors.numpy import save_file

from shared.config import Backend
from shared.evaluation.edges import canny
from tests.shared.evaluate.brush import SIDE, Brush, Pixels
from tests.shared.generate.conftest import base_model, run  # noqa: F401


@pytest.fixture
def controlnet(run: Path) -> Path:  # noqa: F811
    """A run's folder with weights, of which only the bytes count."""
    save_file({"weight": np.zeros(3, np.float32)}, run / "diffusion_pytorch_model.safetensors")
    return run


@pytest.fixture(scope="session")
def truths() -> list[Pixels]:
    """Eight parts of a photograph."""
    photograph = skimage.data.astronaut()
    places = [(row, column) for row in (0, 128, 256, 384) for column in (128, 256)]
    return [photograph[row : row + SIDE, column : column + SIDE] for row, column in places]


@pytest.fixture
def data(truths: list[Pixels], tmp_path: Path) -> Path:
    """Each with its Canny edges as the condition."""
    folder = tmp_path / "data"
    for name in ("source", "target"):
        (folder / name).mkdir(parents=True)
    rows = []
    for place, truth in enumerate(truths):
        Image.fromarray(truth).save(folder / "target" / f"{place}.png")
        Image.fromarray(canny(truth)).save(folder / "source" / f"{place}.png")
        rows.append({"source": f"source/{place}.png", "target": f"target/{place}.png", "prompt": f"part {place}"})
    (folder / "prompt.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def evaluated(controlnet: Path, data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs the command with a brush; the folder that it leaves."""

    def run_command(brush: Brush, *more: object, backend: Backend = "flax") -> Path:
        words = ["--controlnet_model_name_or_path", controlnet, "--eval_data", data, *more]
        brush.run(*words, into=tmp_path / "out", backend=backend)
        return tmp_path / "out"

    return run_command
