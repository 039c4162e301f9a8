"""Which condition images are meant, and what becomes of them."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from shared.data.preprocessing import preprocess
from shared.generate.conditions import ConditionKind, as_conditions, condition_files, grouped, read_conditions
from shared.generate.options import GenerateConfig

IN_COLOURS = ConditionKind(3, "bilinear")


def test_a_folder_stands_for_its_pictures_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt", "c.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub.png").mkdir()
    files = condition_files(GenerateConfig(conditioning_image=(str(tmp_path), str(tmp_path / "b.png"))))
    assert [[file.name for file in of_word] for of_word in files] == [["a.JPG", "b.png", "c.png"], ["b.png"]]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        condition_files(GenerateConfig(conditioning_image=(str(empty),)))
    with pytest.raises(ValueError, match="more than the 1000"):
        condition_files(GenerateConfig(conditioning_image=(str(tmp_path / "b.png"),) * 1001))


def test_several_conditions_come_in_turn(tmp_path: Path) -> None:
    for folder, names in (("depth", ("a.png", "b.png")), ("canny", ("a.jpg", "b.jpg")), ("pose", ("a.png",))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(b"")

    def groups(*words: str, conditions: int = 2) -> list[tuple[str, ...]]:
        files = condition_files(GenerateConfig(conditioning_image=tuple(str(tmp_path / word) for word in words)))
        found = grouped(files, conditions)
        return [tuple(str(path.relative_to(tmp_path)) for path in group) for group in found]

    of_folders = [("depth/a.png", "canny/a.jpg"), ("depth/b.png", "canny/b.jpg")]
    assert groups("depth", "canny") == of_folders
    assert groups("depth/a.png", "canny/a.jpg", "depth/b.png", "canny/b.jpg") == of_folders
    assert groups("depth", "pose/a.png", conditions=1) == [("depth/a.png",), ("depth/b.png",), ("pose/a.png",)]
    with pytest.raises(ValueError, match="names 3 images, and there are 2 conditions: give one of each in turn"):
        groups("depth", "canny", "pose")
    with pytest.raises(ValueError, match="names 2 and 1 pictures for conditions that belong together"):
        groups("depth", "pose")


@pytest.mark.parametrize("size", [(64, 64), (97, 64), (64, 131), (300, 77), (51, 40)])
def test_square_conditions_are_as_in_training(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "condition.png"
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    np.testing.assert_array_equal(read_conditions([path], [IN_COLOURS], 56, 56), preprocess(path, 56, "bilinear"))


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (60, 40), (31, 97)])
def test_other_conditions_cover_the_picture_undistorted(size: tuple[int, int], tmp_path: Path) -> None:
    """As Pillow's own `fit` has it, up to the pixel that truncation may move."""
    path = tmp_path / "condition.png"
    columns, rows = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([columns, rows, (columns + rows) / 2], axis=-1).astype(np.uint8))
    image.save(path)
    given = read_conditions([path], [IN_COLOURS], 40, 72)
    assert given.shape == (40, 72, 3)
    expected = np.asarray(ImageOps.fit(image, (72, 40), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(given.astype(int) - expected).max() <= 6  # a pixel's step of the gradients


def test_a_photograph_becomes_its_condition_at_the_size_of_the_picture() -> None:
    """Canny with the middle of the thresholds of training, by OpenCV itself; in one channel or three."""
    rows, columns = np.mgrid[:64, :96]
    disc_HW1 = np.where((rows - 32) ** 2 + (columns - 48) ** 2 < 20**2, 220, 30)[..., None]
    photograph_HWC = disc_HW1.repeat(3, axis=-1).astype(np.uint8)
    photograph, cropped_HWC = Image.fromarray(photograph_HWC), photograph_HWC[:, 16:80]
    expected_HW = cv2.Canny(cropped_HWC, 100, 250)
    assert 0.01 < (expected_HW > 0).mean() < 0.2
    for channels in (1, 3):
        kind = ConditionKind(channels, "nearest", "canny")
        given_HWC = as_conditions([photograph, photograph], [kind, IN_COLOURS], 64, 64)
        np.testing.assert_array_equal(given_HWC[..., :channels], np.repeat(expected_HW[..., None], channels, axis=-1))
        np.testing.assert_array_equal(given_HWC[..., channels:], cropped_HWC)
