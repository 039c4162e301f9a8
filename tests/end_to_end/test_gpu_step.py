"""`benchmarks.gpu_step`, which is made for GPUs, at a size for CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.profiling.kinds import KINDS
from tests.end_to_end.support.running import PROJECT

SIDES = ["diffusers", "torch", "flax", "torch-xformers"]


def test_every_side_is_measured_or_says_why_not(base_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    flags = ["--sides", *SIDES, "--train_batch_sizes", "2", "--steps", "12", "--mixed_precision", "no"]
    printed = _benchmark(base_model, tmp_path / "runs", *flags, "--workers", "1", "--json", str(out))

    told = json.loads(out.read_text())
    sides = told["results"]["2"]
    assert list(sides) == SIDES
    assert "needs the xformers package" in sides["torch-xformers"]["failed"]
    assert {"torch", "jax", "diffusers"} <= told["versions"].keys()
    for name in SIDES[:3]:
        figures = sides[name]
        assert figures["failed"] is None
        assert figures["images_per_second"] > 0
        assert figures["seconds_to_first_step"] > 0
        time = figures["device_time"]
        assert time["by_part"].keys() >= {"vae", "controlnet", "unet", "unet backward"}
        assert time["by_kind"].keys() <= set(KINDS)
        assert sum(time["by_part"].values()) == pytest.approx(time["total"])
    per_image = {name: sides[name]["model_tflops_per_second"] / sides[name]["images_per_second"] for name in SIDES[:3]}
    assert per_image["torch"] == pytest.approx(per_image["flax"], rel=1e-6)
    assert per_image["diffusers"] == pytest.approx(per_image["flax"], rel=1e-6)

    ratio = sides["torch"]["images_per_second"] / sides["diffusers"]["images_per_second"]
    assert f"| torch | 2 | {sides['torch']['images_per_second']:.1f} | {ratio:.2f} |" in printed
    assert "kind of work | diffusers | torch | flax |" in printed


def test_a_side_for_which_there_is_no_time_is_told(base_model: Path, tmp_path: Path) -> None:
    printed = _benchmark(base_model, tmp_path, "--sides", "torch", "--minutes", "0")
    assert "| torch | 16 | the time was up |" in printed


def _benchmark(base_model: Path, folder: Path, *flags: str) -> str:
    """What it prints."""
    command = [sys.executable, "-m", "benchmarks.gpu_step", "--folder", str(folder), "--model", str(base_model)]
    command += ["--resolution", "64", "--samples", "8", *flags]
    one_device = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=one_device, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
