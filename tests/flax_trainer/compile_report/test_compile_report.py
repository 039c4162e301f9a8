"""`python3 -m flax_trainer.compile_report` as users run it, on the smallest model."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flax_trainer.compile_report.batch_size import search
from flax_trainer.compile_report.report import Memory
from flax_trainer.models import FlaxAutoencoderKL, FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection
from flax_trainer.models.functional import split
from flax_trainer.random_model import ARCHITECTURES
from tests.end_to_end.running import PROJECT

TINY = ["--model", "tiny", "--resolution", "64", "--mixed_precision", "bf16", "--train_batch_size", "2"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flax_trainer.compile_report", *map(str, arguments)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def report(json_file: Path, *arguments: object) -> tuple[str, dict[str, Any]]:
    done = run(*arguments, "--json", json_file)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(json_file.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compile-report")


@pytest.fixture(scope="module")
def pmap(folder: Path) -> tuple[str, dict[str, Any]]:
    return report(folder / "pmap.json", "--target", "v4-8", *TINY, "--snr_gamma", 5)


def test_it_says_what_the_step_needs(pmap: tuple[str, dict[str, Any]]) -> None:
    text, figures = pmap
    for words in ("v4-8: 4 chips, 2 images per chip", "GiB of 32 GiB", "compiler estimate", "MFU", "Cycles by part"):
        assert words in text
    assert figures["kind"] == "compiler estimate"
    assert figures["fits"] is True
    assert figures["peak_hbm_gib"] >= figures["argument_gib"] + figures["temp_gib"]
    assert figures["argument_gib"] > figures["trained_gib"] + figures["optimizer_gib"] + figures["frozen_gib"]
    assert figures["optimizer_gib"] == 2 * figures["trained_gib"]
    seconds = (figures["estimated_cycles"] + figures["collective_cycles"]) / 1.05e9
    assert figures["images_per_second"] == pytest.approx(8 / seconds)
    assert figures["mfu"] == pytest.approx(figures["model_flops"] / seconds / 275e12)
    assert figures["flops"] > figures["model_flops"], "it includes the VAE and the text encoder"
    assert figures["bytes_accessed"] > figures["argument_gib"] * 2**30
    assert {"vae", "text_encoder", "controlnet", "controlnet backward", "unet", "unet backward", "optimizer"} <= set(
        figures["cycles_by_part"]
    )
    assert {"convolutions", "attention", "normalisation", "copies", "collectives"} <= set(figures["cycles_by_kind"])
    assert figures["versions"].keys() == {"jax", "jaxlib", "libtpu", "flax"}


def test_the_other_engine_divides_the_state(pmap: tuple[str, dict[str, Any]], folder: Path) -> None:
    more = ["--parallelism", "mesh", "--fsdp_devices", 4, "--snr_gamma", 5]
    _, figures = report(folder / "mesh.json", "--target", "v4-8", *TINY, *more)
    _, replicated = pmap
    assert figures["optimizer_gib"] < 0.5 * replicated["optimizer_gib"]
    assert figures["frozen_gib"] == replicated["frozen_gib"]
    assert figures["model_flops"] == replicated["model_flops"]
    assert figures["flops"] == pytest.approx(replicated["flops"], rel=0.05)
    assert figures["collective_cycles"] > 0


def write_configurations(folder: Path, name: str = "tiny", **unet: object) -> Path:
    """A model's folder without weights, with changes to its UNet."""
    architecture = ARCHITECTURES[name]
    parts = {"unet": architecture.unet | unet, "vae": architecture.vae, "text_encoder": architecture.text_encoder}
    if architecture.text_encoder_2 is not None:
        parts["text_encoder_2"] = architecture.text_encoder_2
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(architecture.scheduler))
    return folder


def test_a_folder_of_configurations_is_enough(pmap: tuple[str, dict[str, Any]], folder: Path) -> None:
    """Batches that bring latents need no VAE; a training's own --config will do, and its data are not read."""
    (folder / "config.yaml").write_text("train_shards: /nowhere/{000..099}.tar\nmax_train_steps: 10\n")
    model = [
        "--pretrained_model_name_or_path",
        write_configurations(folder / "model"),
        "--config",
        folder / "config.yaml",
    ]
    _, figures = report(folder / "cached.json", "--target", "v4-8", *model, *TINY[2:], "--cached_latents")
    _, online = pmap
    assert figures["model_flops"] == online["model_flops"]
    assert figures["flops"] < online["flops"]
    assert not {"vae", "text_encoder"} & set(figures["cycles_by_part"])


def test_stable_diffusion_xl_is_known_though_not_trained(folder: Path) -> None:
    """From its configurations, and by name with batches that bring latents, both texts and the pooled one."""
    from_folder = ["--pretrained_model_name_or_path", write_configurations(folder / "xl", "tiny_xl")]
    text, online = report(folder / "xl.json", "--target", "v4-8", *from_folder, *TINY[2:])
    by_name, cached = report(
        folder / "xl-cached.json", "--target", "v4-8", "--model", "tiny_xl", *TINY[2:], "--cached_latents"
    )
    for printed in (text, by_name):
        assert printed.startswith("train_flax.py does not train on Stable Diffusion XL yet: this is what its step ")
    assert cached["model_flops"] == online["model_flops"]
    assert cached["flops"] < online["flops"]
    assert {"vae", "text_encoder"} <= set(online["cycles_by_part"])
    assert not {"vae", "text_encoder"} & set(cached["cycles_by_part"])
    assert cached["trained_gib"] == online["trained_gib"]
    assert online["frozen_gib"] - cached["frozen_gib"] == pytest.approx(bytes_of_encoders("tiny_xl") / 2**30, rel=1e-6)


def bytes_of_encoders(name: str) -> int:
    """Of the VAE and both text encoders in bfloat16."""
    architecture = ARCHITECTURES[name]
    models = (
        FlaxAutoencoderKL.abstract(architecture.vae),
        FlaxCLIPTextModel.abstract(architecture.text_encoder),
        FlaxCLIPTextModelWithProjection.abstract(architecture.text_encoder_2 or {}),
    )
    return sum(2 * value.size for model in models for value in split(model)[1].values())


def test_what_does_not_fit_is_said_plainly(folder: Path) -> None:
    model = ["--pretrained_model_name_or_path", write_configurations(folder / "wide", block_out_channels=[4096] * 2)]
    done = run("--target", "v5e-1", *model, *TINY[2:], "--json", folder / "none.json")
    assert done.returncode == 1, done.stderr
    needed = re.search(r"The step does not fit v5e-1: it needs ([\d.]+) GiB of 15.75 GiB of HBM per chip", done.stdout)
    assert needed is not None, done.stdout
    assert float(needed[1]) > 16
    for advice in ("a smaller --train_batch_size than 2", "--gradient_checkpointing", "--parallelism mesh"):
        assert advice in done.stdout
    assert json.loads((folder / "none.json").read_text()) == {"target": "v5e-1", "fits": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "v4-9", *TINY], "--target is 'v4-9'"),
        (["--target", "v4-8", *TINY, "--json", "/nowhere/a.json"], "there is no folder /nowhere"),
        (["--target", "v4-8", *TINY, "--json", "/"], "--json is /, which is a folder"),
        (["--target", "v4-8", *TINY, "--controlnet_model_name_or_path", "x"], "--model tiny stands for all models"),
        (["--target", "v4-8"], "--pretrained_model_name_or_path is missing"),
        (["--target", "v4-8", *TINY, "--mixed_precison", "bf16"], "mixed_precision"),
        (["--target", "v4-8", *TINY, "--parallelism", "mesh", "--fsdp_devices", "3"], "--fsdp_devices is 3"),
        (["--target", "v4-8", "--pretrained_model_name_or_path", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@dataclass
class Fits:
    """As much of a report as the search reads."""

    size: int
    memory: Memory


def tries_of(largest: int, start: int, memory: Callable[[int], float]) -> list[int]:
    """The sizes that the search tries until it has found that one."""
    tried: list[int] = []
    capacity = (memory(largest) + memory(largest + 1)) / 2

    def report_of(size: int) -> Any:
        assert size not in tried
        tried.append(size)
        fits = memory(size) <= capacity
        return Fits(size, Memory(0, 0, 0, 0, 0, peak=int(memory(size)))) if fits else None

    found: Any = search(report_of, start, capacity)
    assert found.size == largest
    return tried


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 7, 8, 13, 15, 16])
@pytest.mark.parametrize("start", [1, 2, 8])
@pytest.mark.parametrize("grows", [1.0, 0.7, 1.3])
def test_the_search_finds_the_largest_batch(largest: int, start: int, grows: float) -> None:
    assert len(tries_of(largest, start, lambda size: 8e9 + 6e8 * size**grows)) <= 9


def test_the_search_goes_where_memory_says() -> None:
    """The figures are those of Stable Diffusion on a v4: 0.58 GiB an image."""
    assert tries_of(41, 4, lambda size: 7.4e9 + 6.2e8 * size) == [4, 8, 41, 46]


def test_the_search_finds_nothing_where_nothing_fits() -> None:
    assert search(lambda size: None, 4, 1e9) is None
