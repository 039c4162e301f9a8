"""Which pictures validation makes, and where they go."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from shared.config import TrainConfig
from shared.evaluation.validation_images import ValidationImages
from shared.tracking import Tracker


class Received:
    """A tracker's destination that keeps what it is sent."""

    def __init__(self) -> None:
        self.tags: list[tuple[str, int, list[str]]] = []

    def log(self, metrics: object, step: int) -> None:
        raise AssertionError("figures are not images")

    def images(self, tag: str, images: list[tuple[str, np.ndarray]], step: int) -> None:
        self.tags.append((tag, step, [caption for caption, _ in images]))

    def truncate_after(self, step: int) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / f"{name}.png") for name in ("white", "black")]
    for path, value in zip(paths, (255, 0), strict=True):
        PIL.Image.new("RGB", (32, 24), (value, value, value)).save(path)
    return paths


def config(tmp_path: Path, images: list[str], prompts: list[str]) -> TrainConfig:
    return TrainConfig(
        resolution=16,
        num_validation_images=2,
        output_dir=str(tmp_path / "run"),
        validation_image=tuple(images),
        validation_prompt=tuple(prompts),
    )


def test_one_prompt_goes_with_all_images_and_one_image_with_all_prompts(paths: list[str], tmp_path: Path) -> None:
    one_prompt = ValidationImages(config(tmp_path, paths, ["a"]))
    assert one_prompt.prompts == ["a", "a", "a", "a"]
    assert one_prompt.conditions_RHWN.shape == (4, 16, 16, 3)
    assert one_prompt.conditions_RHWN[:, 0, 0, 0].tolist() == [255, 255, 0, 0]
    one_image = ValidationImages(config(tmp_path, paths[:1], ["a", "b"]))
    assert one_image.prompts == ["a", "a", "b", "b"]
    assert one_image.conditions_RHWN.min() == 255


def test_each_pair_is_one_picture(paths: list[str], tmp_path: Path) -> None:
    images, received = ValidationImages(config(tmp_path, paths, ["a", "b"])), Received()
    folder = images.write(np.zeros((4, 16, 16, 3), np.uint8), 7, Tracker([received]))
    assert [path.name for path in sorted(folder.iterdir())] == ["0.png", "1.png"]
    assert images.pictures(7) == [(folder / "0.png", "a"), (folder / "1.png", "b")]
    captions = ["condition", "image 0", "image 1"]
    assert received.tags == [("validation/0", 7, captions), ("validation/1", 7, captions)]


def test_several_conditions_come_in_turn_and_stand_side_by_side(paths: list[str], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"conditioning_image_column": ("a", "b"), "conditioning_channels": (1, 3)}
    made = replace(config(tmp_path, [*paths, *paths[::-1]], ["x", "y"]), train_data_dir="data", **changes)
    images, received = ValidationImages(made), Received()
    assert images.conditions_RHWN.shape == (4, 16, 16, 4)
    assert images.conditions_RHWN[::2, 0, 0].tolist() == [[255, 0, 0, 0], [0, 255, 255, 255]]
    images.write(np.zeros((4, 16, 16, 3), np.uint8), 7, Tracker([received]))
    captions = ["condition 1", "condition 2", "image 0", "image 1"]
    assert received.tags == [("validation/0", 7, captions), ("validation/1", 7, captions)]
    one_group = replace(made, validation_image=tuple(paths))
    assert ValidationImages(one_group).conditions_RHWN[:, 0, 0, 0].tolist() == [255] * 4
    one_prompt = ValidationImages(replace(made, validation_prompt=("x",)))
    assert one_prompt.prompts == ["x"] * 4
    assert [prompt for _, prompt in one_prompt.pictures(7)] == ["x", "x"]


def test_images_that_cannot_be_used(paths: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file .*nowhere\.png"):
        ValidationImages(config(tmp_path, ["nowhere.png"], ["a"]))
    Path(paths[0]).write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"white\.png cannot be used"):
        ValidationImages(config(tmp_path, paths, ["a"]))
