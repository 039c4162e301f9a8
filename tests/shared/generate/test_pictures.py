"""What is drawn when, and what is written about it, with a backend that draws one colour."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.generate.output_folder import CONTACT_SHEET, RECORD_FILE
from shared.generate.pictures import Artist, generate
from tests.shared.generate.jobs import PROMPT, prepared

TOKEN = "hf_" + "a1B2c3D4" * 4


def paint(prompts: list[str], conditions_RHWC: np.ndarray, indices: list[int]) -> np.ndarray:
    """Every picture in the shade of its number."""
    return np.stack([np.full_like(conditions_RHWC[0], index) for index in indices])


def test_pictures_come_with_their_settings(run: Path, condition: Path) -> None:
    job = prepared(run, condition, "--prompt", "grün", PROMPT, "--num_images_per_prompt", 2, "--seed", 9)
    parts: list[list[int]] = []

    def draw(prompts: list[str], conditions_RHWC: np.ndarray, indices: list[int]) -> np.ndarray:
        assert len(prompts) == len(conditions_RHWC) == len(indices)
        parts.append(indices)
        return paint(prompts, conditions_RHWC, indices)

    folder = generate(job, Artist("flax", "1 × brush", draw, at_once=3))
    assert parts == [[0, 1, 2], [3]]
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    assert record["finished"] is True
    assert record["settings"]["seed"] == 9
    assert (record["backend"], record["devices"], record["height"]) == ("flax", "1 × brush", 64)
    assert [picture["prompt"] for picture in record["pictures"]] == ["grün", "grün", PROMPT, PROMPT]
    for number, picture in enumerate(record["pictures"]):
        with Image.open(folder / picture["file"]) as image:
            assert np.unique(np.asarray(image)).tolist() == [number]
            assert image.text["prompt"] == picture["prompt"]  # type: ignore[attr-defined]
            settings = json.loads(image.text["generation"])  # type: ignore[attr-defined]
            assert settings["number"] == number
            assert settings["settings"]["num_inference_steps"] == 20
    assert (folder / CONTACT_SHEET).is_file()


def test_no_secret_is_written(run: Path, condition: Path) -> None:
    job = prepared(run, condition, "--prompt", f"a circle {TOKEN}")
    address = "https://user:pa55word@example.org/model?key=secret"
    (controlnet,) = job.models.controlnets
    named = dataclasses.replace(controlnet.config, pretrained_model_name_or_path=address)
    models = dataclasses.replace(job.models, controlnets=[dataclasses.replace(controlnet, config=named)])
    config = dataclasses.replace(job.config, pretrained_model_name_or_path=address)
    job = dataclasses.replace(job, config=config, models=models)
    folder = generate(job, Artist("flax", "1 × brush", paint, at_once=1))
    with Image.open(folder / "000.png") as image:
        texts = "".join(image.text.values())  # type: ignore[attr-defined]
    texts += (folder / RECORD_FILE).read_text()
    assert "example.org/model" in texts
    for secret in (TOKEN, "pa55word", "key=secret"):
        assert secret not in texts


def test_what_is_interrupted_says_so_and_can_be_drawn_again(run: Path, condition: Path) -> None:
    def interrupted(prompts: list[str], conditions_RHWC: np.ndarray, indices: list[int]) -> np.ndarray:
        if indices != [0]:
            raise KeyboardInterrupt
        return paint(prompts, conditions_RHWC, indices)

    job = prepared(run, condition, "--num_images_per_prompt", 2)
    with pytest.raises(KeyboardInterrupt):
        generate(job, Artist("flax", "1 × brush", interrupted, at_once=1))
    folder = Path(job.config.output_dir)
    assert json.loads((folder / RECORD_FILE).read_text())["finished"] is False
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", RECORD_FILE]
    again = prepared(run, condition)
    generate(again, Artist("flax", "1 × brush", paint, at_once=1))
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", CONTACT_SHEET, RECORD_FILE]
