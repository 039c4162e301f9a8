"""`benchmarks.gpu_step`, which is made for GPUs, at a size for CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_step
from shared.profiling.kinds import KINDS
from tests.end_to_end.support.running import PROJECT

SIDES = ["diffusers", "torch", "flax"]


def test_every_side_is_measured(base_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    flags = ["--sides", *SIDES, "--train_batch_sizes", "2", "--steps", "12", "--mixed_precision", "no"]
    printed = _benchmark(base_model, tmp_path / "runs", *flags, "--workers", "1", "--json", str(out))

    told = json.loads(out.read_text())
    assert {"torch", "jax", "diffusers"} <= told["versions"].keys()
    sides = told["results"]["2"]
    assert list(sides) == SIDES
    for figures in sides.values():
        assert figures["failed"] is None
        assert figures["images_per_second"] > 0
        assert figures["seconds_to_first_step"] > 0
        time = figures["device_time"]
        assert time["by_part"].keys() >= {"vae", "controlnet", "unet", "unet backward"}
        assert time["by_kind"].keys() <= set(KINDS)
        assert sum(time["by_part"].values()) == pytest.approx(time["total"])
    per_image = [figures["model_tflops_per_second"] / figures["images_per_second"] for figures in sides.values()]
    assert per_image == pytest.approx([per_image[0]] * 3, rel=1e-6)

    ratio = sides["torch"]["images_per_second"] / sides["diffusers"]["images_per_second"]
    assert f"| torch | 2 | {sides['torch']['images_per_second']:.1f} | {ratio:.2f} |" in printed
    assert "kind of work | diffusers | torch | flax |" in printed


def test_a_side_that_fails_is_told_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        gpu_step.ran([sys.executable, "-c", "raise SystemExit('error: no xformers here')"], tmp_path / "torch-2", 60)

    def fails(run: Path, *_: object) -> gpu_step.Figures:
        raise subprocess.CalledProcessError(1, "train_torch.py")

    figures = gpu_step.figures_or_reason(fails, tmp_path / "torch-2")
    assert figures.failed == "exit code 1: error: no xformers here"
    assert (
        gpu_step.row("torch", 2, {"torch": figures}) == "| torch | 2 | exit code 1: error: no xformers here | | | | |"
    )


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
