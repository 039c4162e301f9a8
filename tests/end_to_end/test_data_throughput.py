"""`benchmarks.data_throughput` at a size for tests."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
from transformers import CLIPTokenizer

from benchmarks.guide_loader import guide_loader
from benchmarks.photo_folder import write_photo_folder
from shared.config.demo import BASE_MODEL
from shared.data.preprocessing import decode, preprocess

PROJECT = Path(__file__).parents[2]


def test_every_side_is_measured_and_every_part_of_a_pair(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.data_throughput", "--folder", str(tmp_path / "data")]
    command += ["--json", str(tmp_path / "figures.json"), "--resolution", "64", "--samples", "4"]
    command += ["--seconds", "0.1", "--rounds", "1"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "figures.json").read_text())["cases"]
    assert list(cases) == ["photos", "circles", "prepared"]
    for figures in cases.values():
        assert list(figures["rates"]) == ["ours, folder", "ours, tar", "reference"]
        assert min(figures["rates"].values()) > 0
        assert figures["parts"]["decode the image"] > 0
    assert "of the reference on the photos that they were made of" in done.stdout


def test_the_reference_trains_on_our_pixels(tmp_path: Path) -> None:
    """As the guide scales them: targets from -1 to 1, conditions from 0 to 1."""
    write_photo_folder(tmp_path, 1)
    assert decode(tmp_path / "0.jpg").size == (1024, 768)
    with PIL.Image.open(tmp_path / "0.cond.png") as condition:
        assert condition.mode == "L"
    tokenizer = CLIPTokenizer.from_pretrained(BASE_MODEL, subfolder="tokenizer")
    batch = next(iter(guide_loader(tmp_path, tokenizer, 64, 1, workers=0)))
    for name, file, scale in (("pixel_values", "0.jpg", 127.5), ("conditioning_pixel_values", "0.cond.png", 255)):
        pixels_HWC = batch[name][0].permute(1, 2, 0).numpy() * scale + (127.5 if scale == 127.5 else 0)
        ours_HWC = preprocess(tmp_path / file, 64, "bilinear").astype(np.float32)
        assert np.abs(pixels_HWC - ours_HWC).max() < 1.01
