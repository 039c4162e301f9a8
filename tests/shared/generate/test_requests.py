"""Which pictures are asked for, and what becomes of their conditions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from shared.data.preprocessing import preprocess
from shared.generate.options import GenerateConfig
from shared.generate.requests import Request, condition_files, grouped, pair, prompts_of, read_conditions


def test_pictures_of_a_pair_have_numbers_that_follow_each_other() -> None:
    assert pair(["a", "b"], 2, 2) == [Request(0, "a", 0), Request(1, "a", 0), Request(2, "b", 1), Request(3, "b", 1)]
    assert pair(["a"], 3, 1) == [Request(0, "a", 0), Request(1, "a", 1), Request(2, "a", 2)]
    assert pair(["a", "b"], 1, 1) == [Request(0, "a", 0), Request(1, "b", 0)]
    assert Request(7, "a", 0).file_name == "007.png"
    with pytest.raises(ValueError, match="2 prompts and 3 condition images"):
        pair(["a", "b"], 3, 1)


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


def test_a_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red circle\n\n  grün  \n", encoding="utf-8")
    assert prompts_of(GenerateConfig(prompt_file=str(path))) == ["a red circle", "grün"]
    path.write_text("a red circle\r\ngrün", encoding="utf-16")  # with its byte order mark, as PowerShell writes it
    assert prompts_of(GenerateConfig(prompt_file=str(path))) == ["a red circle", "grün"]
    path.write_bytes(b"\xfcber")
    with pytest.raises(ValueError, match="not UTF-8 at byte 0"):
        prompts_of(GenerateConfig(prompt_file=str(path)))
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        prompts_of(GenerateConfig(prompt_file=str(path)))
    with pytest.raises(ValueError, match="nowhere"):
        prompts_of(GenerateConfig(prompt_file=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("size", [(64, 64), (97, 64), (64, 131), (300, 77), (51, 40)])
def test_square_conditions_are_as_in_training(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "condition.png"
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    np.testing.assert_array_equal(read_conditions([path], [3], 56, 56, "bilinear"), preprocess(path, 56, "bilinear"))


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (60, 40), (31, 97)])
def test_other_conditions_cover_the_picture_undistorted(size: tuple[int, int], tmp_path: Path) -> None:
    """As Pillow's own `fit` has it, up to the pixel that truncation may move."""
    path = tmp_path / "condition.png"
    columns, rows = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([columns, rows, (columns + rows) / 2], axis=-1).astype(np.uint8))
    image.save(path)
    given = read_conditions([path], [3], 40, 72, "bilinear")
    assert given.shape == (40, 72, 3)
    expected = np.asarray(ImageOps.fit(image, (72, 40), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(given.astype(int) - expected).max() <= 6  # a pixel's step of the gradients
