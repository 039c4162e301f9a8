"""Conditions are what their names say, the same every time, and the shards with them train."""

import json
import tarfile
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

from shared.data.preprocessing import decode
from shared.data.sources import RandomAccessSource, open_source
from shared.prepare_data.command import main
from shared.prepare_data.conditions import make_condition
from shared.prepare_data.options import ComputedCondition
from tests.shared.data.pictures import config, loader, pairs, write_image_folder, write_images, write_prompt_json

NAMES: tuple[ComputedCondition, ...] = get_args(ComputedCondition)


def picture(height: int = 96, width: int = 160) -> npt.NDArray[np.uint8]:
    """uint8 [H,W,3]: a slope of colours with a disc on it."""
    y_HW, x_HW = np.mgrid[:height, :width]
    disc_HW = (y_HW - height / 2) ** 2 + (x_HW - width / 2) ** 2 < (height / 4) ** 2
    slopes_HWC = np.stack([x_HW, y_HW, x_HW + y_HW], axis=-1) * 255 // (height + width)
    return np.where(disc_HW[..., None], (255, 250, 5), slopes_HWC).astype(np.uint8)


def made(
    name: ComputedCondition, seed: int = 0, image_HWC: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    return make_condition(name, picture() if image_HWC is None else image_HWC, np.random.default_rng(seed))


@pytest.mark.parametrize("name", NAMES)
def test_a_condition_is_a_function_of_image_and_seed(name: ComputedCondition) -> None:
    image_HWC = picture()
    before = image_HWC.copy()
    condition = made(name, 3, image_HWC)
    assert condition.dtype == np.uint8
    assert condition.shape[:2] == image_HWC.shape[:2]
    np.testing.assert_array_equal(condition, made(name, 3))
    np.testing.assert_array_equal(image_HWC, before)
    varies = any(not np.array_equal(condition, made(name, seed)) for seed in range(4, 24))
    assert varies == (name not in ("grey", "palette", "canny")), "those are the same for this image, whatever the seed"
    assert made(name, 0, picture(1, 1)).shape[:2] == (1, 1)


def test_canny_is_opencvs_with_thresholds_that_vary() -> None:
    noise_HWC = np.random.default_rng(0).integers(0, 60, (64, 64, 3), np.uint8)
    found = {made("canny", seed, noise_HWC).tobytes() for seed in range(20)}
    assert len(found) > 10
    loosest, strictest = (cv2.Canny(noise_HWC, low, high) > 0 for low, high in ((50, 100), (150, 450)))
    for edges in found:
        edges_HW = np.frombuffer(edges, np.uint8).reshape(64, 64)
        assert set(np.unique(edges_HW)) <= {0, 255}
        assert not (strictest & (edges_HW == 0)).any()
        assert not ((edges_HW > 0) & ~loosest).any()


def test_grey_is_the_luma_of_opencv() -> None:
    expected_HW = cv2.cvtColor(picture(), cv2.COLOR_RGB2GRAY)
    assert np.abs(made("grey").astype(int) - expected_HW.astype(int)).max() <= 1


def test_palettes_are_squares_of_their_means() -> None:
    image_HWC = picture(128, 192)
    palette_HWC = made("palette", image_HWC=image_HWC)
    for top in range(0, 128, 64):
        for left in range(0, 192, 64):
            square = (slice(top, top + 64), slice(left, left + 64))
            assert len(np.unique(palette_HWC[square].reshape(-1, 3), axis=0)) == 1
            np.testing.assert_allclose(palette_HWC[square][0, 0], image_HWC[square].mean(axis=(0, 1)), atol=1)


@pytest.mark.parametrize("name", ["blur", "tile"])
def test_detail_is_lost_and_brightness_is_not(name: ComputedCondition) -> None:
    rng = np.random.default_rng(1)
    image_HWC = rng.integers(0, 256, (128, 128, 3), np.uint8)
    for seed in range(5):
        condition_HWC = made(name, seed, image_HWC)
        assert condition_HWC.std() < 0.75 * image_HWC.std()
        assert abs(condition_HWC.mean() - image_HWC.mean()) < 2


def test_masks_are_black_and_the_rest_is_the_image() -> None:
    image_HWC = np.maximum(picture(), 1)
    for seed in range(20):
        condition_HWC = made("inpaint", seed, image_HWC)
        masked_HW = (condition_HWC == 0).all(axis=-1)
        assert 0.01 < masked_HW.mean() < 0.9
        np.testing.assert_array_equal(condition_HWC[~masked_HW], image_HWC[~masked_HW])


def annotate(output: Path, *words: object) -> int:
    return main(["annotate", "--output_dir", str(output), "--num_workers", "2", *map(str, words)])


def layouts(folder: Path, name: str) -> tuple[str, ...]:
    """Images and captions, without conditions but in prompt.json."""
    samples: list[dict[str, Any]] = pairs(6)
    match name:
        case "metadata.jsonl":
            write_images(folder, samples)
            rows = [{"file_name": f"image/{n:04d}.png", "text": one["text"]} for n, one in enumerate(samples)]
            (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return "--train_data_dir", str(folder), "--image_column", "file_name"
        case "image folder":
            return "--train_data_dir", str(write_image_folder(folder, samples))
        case "prompt.json":
            return "--train_data_dir", str(write_prompt_json(folder, samples))
        case _:  # as img2dataset writes it
            folder.mkdir()
            with tarfile.open(folder / "00000.tar", "w") as tar:
                for number, one in enumerate(samples):
                    for ending, content in (("png", one["image"]), ("txt", one["text"].encode()), ("json", b"{}")):
                        (folder / "member").write_bytes(content)
                        tar.add(folder / "member", f"{number:09d}.{ending}")
            return "--train_shards", f"{folder}/*.tar"


@pytest.mark.parametrize("layout", ["metadata.jsonl", "image folder", "prompt.json", "img2dataset"])
def test_images_and_captions_become_shards_that_train(tmp_path: Path, layout: str) -> None:
    words = layouts(tmp_path / "data", layout)
    assert annotate(tmp_path / "shards", *words, "--condition", "grey", "--resolution", 32) == 0
    training = config(train_shards=(f"{tmp_path}/shards/*.tar",))
    source = open_source(training)
    assert isinstance(source, RandomAccessSource)
    for number in range(6):
        sample = source[number]
        assert sample.captions == (f"caption {number}",)
        assert sample.image is not None
        expected = decode(sample.image).convert("L").convert("RGB")
        assert decode(sample.conditions[0]).tobytes() == expected.tobytes()
    batch = loader(training).batch(0)
    assert not np.array_equal(batch["pixel_values"], batch["conditioning_pixel_values"])
    assert annotate(tmp_path / "again", *words, "--condition", "grey", "--resolution", 32) == 0
    assert (tmp_path / "again" / "000000.tar").read_bytes() == (tmp_path / "shards" / "000000.tar").read_bytes()


def test_a_list_of_images_alone_needs_no_flag_and_no_library(tmp_path: Path) -> None:
    words = layouts(tmp_path / "data", "metadata.jsonl")[:2]
    assert annotate(tmp_path / "shards", *words, "--condition", "grey") == 0
    assert json.loads((tmp_path / "shards" / "packed.json").read_text())["settings"]["data"]["kind"] == "image_folder"


def test_edges_are_stored_in_one_channel(tmp_path: Path) -> None:
    assert annotate(tmp_path, "--generated_circles", 2, "--resolution", 64, "--condition", "canny") == 0
    with tarfile.open(tmp_path / "000000.tar") as tar:
        file = tar.extractfile("000000000.conditioning_image.png")
        assert file is not None
        with PIL.Image.open(file) as condition:
            assert condition.mode == "L"
            assert set(np.unique(np.asarray(condition))) == {0, 255}


def test_a_mistake_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    circles = ("--generated_circles", 2, "--resolution", 16)
    assert annotate(tmp_path / "a", *circles) == 2
    assert "--condition is missing: name one of canny, grey, blur, palette, tile, inpaint" in capsys.readouterr().err
    assert annotate(tmp_path / "a", *circles, "--condition", "edges") == 2
    assert "--condition must be one of canny, grey" in capsys.readouterr().err
    assert annotate(tmp_path / "a", *circles, "--condition", "canny", "--annotator_model", "x") == 2
    assert "--annotator_model is about conditions that a model makes (depth, segmentation" in capsys.readouterr().err
    assert annotate(tmp_path / "a", *circles, "--condition", "canny", "--batch_size", 8) == 2
    assert "--batch_size is about conditions that a model makes" in capsys.readouterr().err
    assert annotate(tmp_path / "a", *circles, "--condition", "tile") == 0
    assert annotate(tmp_path / "a", *circles, "--condition", "blur") == 2
    assert "holds another packing: its condition was" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    assert annotate(tmp_path / "b", *circles, "--condition", "canny") == 2
    assert "pip install opencv-python-headless" in capsys.readouterr().err
