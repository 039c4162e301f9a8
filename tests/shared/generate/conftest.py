"""Jobs of the smallest models, without their weights: whatever is told here is told without them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from flax_trainer.random_model import write_random_model
from shared.config import TrainConfig, to_yaml
from shared.models.configs import ControlNetConfig, UNet2DConditionConfig, read_config
from tests.end_to_end.support.tiny_runs import ONE_RESOLUTION, ONE_RESOLUTION_XL


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_random_model(ONE_RESOLUTION, folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture(scope="session")
def xl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xl")
    write_random_model(ONE_RESOLUTION_XL, folder)
    return folder


@pytest.fixture
def condition(tmp_path: Path) -> Path:
    path = tmp_path / "condition.png"
    Image.new("RGB", (80, 64), "navy").save(path)
    return path


@pytest.fixture
def run(base_model: Path, tmp_path: Path) -> Path:
    """What a run leaves, but for the weights."""
    folder = tmp_path / "run"
    write_controlnet_config(folder, base_model)
    config = TrainConfig(pretrained_model_name_or_path=str(base_model), resolution=64, seed=5)
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def write_controlnet_config(folder: Path, base_model: Path) -> None:
    folder.mkdir()
    unet = read_config(base_model / "unet" / "config.json", UNet2DConditionConfig)
    config = {"_class_name": "ControlNetModel", **ControlNetConfig.from_unet_config(unet).to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
