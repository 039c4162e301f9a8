"""`python3 -m flax_trainer.compile_report` as users run it, on the smallest model."""

import contextlib
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest

from flax_trainer.base_models import ModelConfigs
from flax_trainer.compile_report.__main__ import main
from flax_trainer.compile_report.batch_size import search
from flax_trainer.compile_report.costs import Costs
from flax_trainer.compile_report.in_subprocess import CompilerCrashedError
from flax_trainer.compile_report.report import GIB, DoesNotFitError, Memory, Report
from flax_trainer.compile_report.targets import parse_target
from flax_trainer.compile_report.text import does_not_fit_text
from flax_trainer.models import (
    FlaxAutoencoderKL,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxControlNetModel,
    FlaxUNet2DConditionModel,
)
from flax_trainer.models.params import split
from flax_trainer.profiling.model_flops import flops_of
from flax_trainer.random_model import ARCHITECTURES
from shared.config import TrainConfig
from tests.end_to_end.support.running import PROJECT

TINY = ["--model", "tiny", "--resolution", "64", "--mixed_precision", "bf16", "--train_batch_size", "2"]
# Of one block without transformers, which the compiler takes a third of the time for.
ONE_BLOCK: dict[str, Any] = {
    "block_out_channels": [32],
    "down_block_types": ["DownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["UpBlock2D"],
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flax_trainer.compile_report", *map(str, arguments)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def in_this_process(report: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return report(*args, **kwargs)


def report(json_file: Path, *arguments: object) -> tuple[str, dict[str, Any]]:
    """As `run`, with the compiler in this process, which spares the seconds that two of them take to import JAX."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr("flax_trainer.compile_report.__main__.in_subprocess", in_this_process)
        assert main([*map(str, arguments), "--json", str(json_file)]) == 0
    return output.getvalue(), json.loads(json_file.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compile-report")


@pytest.fixture(scope="module")
def pmap(folder: Path) -> tuple[str, dict[str, Any]]:
    """From the command line."""
    done = run("--target", "v4-8", *TINY, "--snr_gamma", 5, "--json", folder / "pmap.json")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "pmap.json").read_text())


def test_it_says_what_the_step_needs(pmap: tuple[str, dict[str, Any]]) -> None:
    text, figures = pmap
    for words in ("v4-8: 4 chips, 2 images per chip", "GiB of 32 GiB", "compiler estimate", "MFU", "Cycles by part"):
        assert words in text
    assert figures["kind"] == "compiler estimate"
    flags = {"resolution": 64, "mixed_precision": "bf16", "train_batch_size": 2, "snr_gamma": 5.0}
    assert figures["flags"] == {"pretrained_model_name_or_path": "tiny"} | flags
    assert "--mixed_precision bf16" in text.splitlines()[1]
    assert "The model is made for" not in text
    assert figures["fits"] is True
    assert figures["peak_hbm_gib"] >= figures["argument_gib"] + figures["temp_gib"]
    assert figures["argument_gib"] > figures["trained_gib"] + figures["optimizer_gib"] + figures["frozen_gib"]
    assert figures["optimizer_gib"] == 2 * figures["trained_gib"]
    assert 0 < figures["waiting_cycles"] <= figures["collective_cycles"]
    seconds = (figures["estimated_cycles"] + figures["waiting_cycles"]) / 1.05e9
    assert figures["images_per_second"] == pytest.approx(8 / seconds)
    assert figures["mfu"] == pytest.approx(figures["model_flops"] / seconds / 275e12)
    assert figures["flops"] > figures["model_flops"], "it includes the VAE and the text encoder"
    assert figures["bytes_accessed"] > figures["argument_gib"] * 2**30
    assert {"vae", "text_encoder", "controlnet", "controlnet backward", "unet", "unet backward", "optimizer"} <= set(
        figures["cycles_by_part"]
    )
    assert {"convolutions", "attention", "normalisation", "copies", "collectives"} <= set(figures["cycles_by_kind"])
    assert figures["versions"].keys() == {"jax", "jaxlib", "libtpu", "flax"}


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


@pytest.fixture(scope="module")
def small(folder: Path) -> list[object]:
    """The flags of a model of fewer layers, which compiles in less time; a folder of configurations."""
    model = write_configurations(folder / "small", **ONE_BLOCK)
    return ["--pretrained_model_name_or_path", model, *TINY[2:]]


@pytest.fixture(scope="module")
def cached(folder: Path, small: list[object]) -> dict[str, Any]:
    """Batches that bring latents need no VAE; a training's own --config will do, and its data are not read."""
    (folder / "config.yaml").write_text("train_shards: /nowhere/{000..099}.tar\nmax_train_steps: 10\n")
    own_config = ["--config", folder / "config.yaml"]
    return report(folder / "cached.json", "--target", "v4-8", *small, *own_config, "--cached_latents")[1]


def test_a_folder_of_configurations_is_enough(pmap: tuple[str, dict[str, Any]], cached: dict[str, Any]) -> None:
    _, online = pmap
    assert 0 < cached["model_flops"] < online["model_flops"], "it is a smaller model"
    assert cached["flops"] < online["flops"]
    assert not {"vae", "text_encoder"} & set(cached["cycles_by_part"])
    assert {"controlnet", "controlnet backward", "unet", "unet backward", "optimizer"} <= set(cached["cycles_by_part"])


def test_the_other_engine_divides_the_state(folder: Path, small: list[object], cached: dict[str, Any]) -> None:
    more = ["--parallelism", "mesh", "--fsdp_devices", 4, "--cached_latents"]
    _, figures = report(folder / "mesh.json", "--target", "v4-8", *small, *more)
    assert figures["optimizer_gib"] < 0.5 * cached["optimizer_gib"]
    assert figures["frozen_gib"] == cached["frozen_gib"]
    assert figures["model_flops"] == cached["model_flops"]
    assert figures["flops"] == pytest.approx(cached["flops"], rel=0.05)
    assert figures["collective_cycles"] > 0


def test_pictures_take_twenty_steps_of_each_network(folder: Path, small: list[object]) -> None:
    text, figures = report(folder / "drawn.json", "--target", "v5e-4", *small, "--generate")
    assert "v5e-4: 4 chips, 2 pictures at once on each, 20 steps of UniPC (compiler estimate)" in text
    assert (figures["kind"], figures["flags"]["generate"]) == ("compiler estimate", True)
    cycles = figures["cycles_by_part"]
    assert {"vae", "controlnet", "unet"} <= set(cycles)
    assert not {"unet backward", "optimizer"} & set(cycles)
    assert figures["estimated_cycles"] == pytest.approx(sum(cycles.values()))
    assert figures["pictures_per_second"] == pytest.approx(4 * 2 * 1.5e9 / figures["estimated_cycles"])
    assert figures["peak_hbm_gib"] > figures["models_gib"] > 0
    architecture = ARCHITECTURES["tiny"]
    configs = ModelConfigs.of(architecture.unet | ONE_BLOCK, architecture.vae, architecture.text_encoder)
    unet, controlnet = flops_of_guided_networks(configs, pictures=2)
    vae, params = split(FlaxAutoencoderKL.abstract(configs.vae))
    decode = jax.make_jaxpr(lambda params, latents: vae.bind(params).decode(latents))
    decoded = flops_of(decode(params, jax.ShapeDtypeStruct((2, 8, 8, 4), "float32")).jaxpr)
    assert figures["model_flops"] == pytest.approx(20 * (unet + controlnet) + decoded, rel=1e-6)


def flops_of_guided_networks(configs: ModelConfigs, pictures: int) -> list[float]:
    """Of the UNet's and the ControlNet's forward passes, with and without the prompt of each picture of 64 pixels."""
    rows = 2 * pictures
    latents, timesteps = jax.ShapeDtypeStruct((rows, 8, 8, 4), "float32"), jax.ShapeDtypeStruct((rows,), "int32")
    prompt = jax.ShapeDtypeStruct((rows, 77, configs.text_encoder.hidden_size), "float32")
    condition = jax.ShapeDtypeStruct((rows, 64, 64, 3), "float32")
    flops = []
    for model, inputs in (
        (FlaxUNet2DConditionModel.abstract(configs.unet), (latents, timesteps, prompt)),
        (FlaxControlNetModel.abstract(configs.controlnet), (latents, timesteps, prompt, condition)),
    ):
        definition, params = split(model)
        forward = jax.make_jaxpr(lambda params, *inputs, definition=definition: definition.bind(params)(*inputs))
        flops.append(flops_of(forward(params, *inputs).jaxpr))
    return flops


def test_stable_diffusion_xl(folder: Path) -> None:
    """From its configurations, with images and with batches that bring latents, both texts and the pooled one."""
    one_block = ONE_BLOCK | {"attention_head_dim": [2], "transformer_layers_per_block": [1]}
    model = ["--pretrained_model_name_or_path", write_configurations(folder / "xl", "tiny_xl", **one_block)]
    _, online = report(folder / "xl.json", "--target", "v4-8", *model, *TINY[2:])
    _, cached = report(folder / "xl-cached.json", "--target", "v4-8", *model, *TINY[2:], "--cached_latents")
    assert cached["model_flops"] == online["model_flops"]
    assert cached["flags"]["cached_latents"] is True
    assert cached["flops"] < online["flops"]
    assert {"vae", "text_encoder"} <= set(online["cycles_by_part"])
    assert not {"vae", "text_encoder"} & set(cached["cycles_by_part"])
    assert cached["trained_gib"] == online["trained_gib"]
    assert online["frozen_gib"] - cached["frozen_gib"] == pytest.approx(bytes_of_encoders("tiny_xl") / 2**30, rel=1e-6)


def bytes_of_encoders(name: str) -> int:
    """Of both text encoders in bfloat16, and of the VAE in float32."""
    architecture = ARCHITECTURES[name]
    models = (
        (4, FlaxAutoencoderKL.abstract(architecture.vae)),
        (2, FlaxCLIPTextModel.abstract(architecture.text_encoder)),
        (2, FlaxCLIPTextModelWithProjection.abstract(architecture.text_encoder_2 or {})),
    )
    return sum(size * value.size for size, model in models for value in split(model)[1].values())


def test_what_does_not_fit_is_said_plainly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = ONE_BLOCK | {"block_out_channels": [6144]}
    model = ["--pretrained_model_name_or_path", write_configurations(folder / "wide", **wide), "--cached_latents"]
    monkeypatch.setattr("flax_trainer.compile_report.__main__.in_subprocess", in_this_process)
    json_file = folder / "none.json"
    assert main([*map(str, ("--target", "v5e-1", *model, *TINY[2:])), "--json", str(json_file)]) == 1
    told = capsys.readouterr().out
    needed = re.search(r"The step does not fit v5e-1: it needs ([\d.]+) GiB of 15.75 GiB of HBM per chip", told)
    assert needed is not None, told
    assert float(needed[1]) > 16
    for advice in ("a smaller --train_batch_size than 2", "--gradient_checkpointing", "memory: v4, v5p, v6e"):
        assert advice in told
    assert "--parallelism mesh" not in told, "there is one chip"
    figures = json.loads(json_file.read_text())
    assert (figures["target"], figures["fits"], figures["flags"]["train_batch_size"]) == ("v5e-1", False, 2)


def test_advice_is_of_what_is_not_done_yet() -> None:
    done = TrainConfig(
        gradient_checkpointing=True,
        enable_xformers_memory_efficient_attention=True,
        mixed_precision="bf16",
        parallelism="mesh",
        fsdp_devices=4,
        train_batch_size=1,
        resolution=512,
    )

    def advice(config: TrainConfig) -> list[str]:
        error = ValueError("Ran out of memory in memory space hbm. Used 98.24G of 95.74G hbm.")
        title, *lines = does_not_fit_text(config, parse_target("v5p-8"), error).splitlines()
        assert "it needs 98.24 GiB of 95.74 GiB of HBM per chip" in title
        return lines

    assert advice(done) == ["  a smaller --resolution than 512"]
    assert len(advice(dataclasses.replace(done, fsdp_devices=2))) == 2
    assert len(advice(dataclasses.replace(done, gradient_checkpointing_policy="all_but_products", use_ema=True))) == 3
    assert len(advice(TrainConfig(train_batch_size=2, enable_xformers_memory_efficient_attention=False))) == 6
    assert len(advice(TrainConfig(train_batch_size=2))) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "v4-9", *TINY], "--target is 'v4-9'"),
        (["--target", "v4-8", *TINY, "--json", "/nowhere/a.json"], "there is no folder /nowhere"),
        (["--target", "v4-8", *TINY, "--json", "/"], "--json is /, which is a folder"),
        (["--target", "v4-8", *TINY, "--controlnet_model_name_or_path", "x"], "--model tiny stands for all models"),
        (["--target", "v4-8", *TINY, "--print_config"], "--print_config is a flag of train_flax.py and train_torch.py"),
        (["--target", "v4-8"], "--pretrained_model_name_or_path is missing"),
        (["--target", "v4-8", *TINY, "--generate", "--find_batch_size"], "--find_batch_size is about a training step"),
        (["--target", "v4-8", *TINY, "--mixed_precison", "bf16"], "mixed_precision"),
        (["--target", "v4-8", *TINY, "--parallelism", "mesh", "--fsdp_devices", "3"], "--fsdp_devices is 3"),
        (["--target", "v4-8", "--pretrained_model_name_or_path", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flax_trainer.compile_report.__main__.in_subprocess", in_this_process)
    monkeypatch.setattr(jax.stages.Lowered, "compile", compiles_nothing)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def compiles_nothing(*_: object, **__: object) -> None:
    raise AssertionError("nothing is to be compiled")


def test_a_mistake_ends_the_process_with_its_message_alone() -> None:
    done = run("--target", "v4-9", *TINY)
    assert done.returncode == 2, done.stderr
    assert "--target is 'v4-9'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--target is missing"),
        (["--target"], "--target needs a value"),
        (["--target", "v4-\u0668"], "--target is 'v4-\u0668'; expected"),
        (["--target", "v4-" + "9" * 5000], "--target is a text of 5003 characters"),
        (["--target", "v4-8", "--model", "SECRET" * 6], "--model is a text of 36 characters; expected one of tiny"),
        (["--target", "SECRET" * 6, *TINY], "--target is a text of 36 characters"),
        (["--target", "v4-8", *TINY, "--find_batch_size=" + "SECRET" * 6], "--find_batch_size is either true or false"),
        (["--target", "v4-8", *TINY, "--cached_latent"], "did you mean --cached_latents?"),
        (["--target", "v4-8", *TINY, "--hub_token:" + "SECRET" * 6], "did you mean --hub_token?"),
        (["SECRET" * 6, "--target", "v4-8", *TINY], "a text of 36 characters stands before the first flag"),
        (["--target", "v4-8", *TINY, "--json", "/dev/null"], "which is no file"),
        (["--target", "v4-8", *TINY, "--json", "x" * 5000], "File name too long"),
        (["--target", "v4-8", *TINY, "--json", "a\x1b[2J"], "--json holds the control character"),
    ],
)
def test_mistakes_in_its_own_flags_are_told_without_what_may_be_a_secret(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "SECRET" not in told
    assert told.count("\n") == 1


def test_help_names_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"--{flag}" in told for flag in ("target", "model", "json", "find_batch_size", "generate"))


def test_find_batch_size_searches_for_every_policy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With a compiler for which an image takes 2 GiB, or less where the backward pass recomputes, beside 4 GiB.

    At one of the sizes that would fit it crashes.
    """

    def compiled(config: TrainConfig, *_: object, from_cache: bool) -> Report:
        size = config.train_batch_size
        of_an_image = {"everything": 0.5, "all_but_products": 1.0}[config.gradient_checkpointing_policy]
        needed = 4 + size * (of_an_image if config.gradient_checkpointing else 2)
        if needed > 32:
            raise DoesNotFitError("Ran out of memory in memory space hbm.")
        if config.gradient_checkpointing and size == 28:
            raise CompilerCrashedError
        memory, costs = Memory(0, 0, 0, 0, 0, int(needed * GIB)), Costs({}, {}, 1e8, 0, 0, 0, 0)
        return Report(parse_target("v4-8"), config, from_cache, size, 4 * size, memory, costs, 1e12, 1e9, 1e12, 1)

    monkeypatch.setattr("flax_trainer.compile_report.batch_size.compile_report", compiled)
    monkeypatch.setattr("flax_trainer.compile_report.batch_size.in_subprocess", in_this_process)
    json_file = tmp_path / "found.json"
    assert main(["--target", "v4-8", *TINY, "--cached_latents", "--find_batch_size", "--json", str(json_file)]) == 0
    *tried, none, everything, all_but_products = capsys.readouterr().out.splitlines()
    assert none == "none: --train_batch_size 14 fits"
    assert everything == "everything: --train_batch_size 56 fits"
    assert all_but_products == "all_but_products: --train_batch_size 25 fits"
    assert "all_but_products  --train_batch_size 28    the compiler crashed" in tried
    assert "none              --train_batch_size 2       8.00 GiB" in tried[0]
    assert tried.index(next(line for line in tried if line.startswith("everything"))) <= 5, "each try compiles"
    figures = json.loads(json_file.read_text())
    assert figures["everything"]["flags"]["train_batch_size"] == 56
    assert figures["everything"]["flags"]["gradient_checkpointing"] is True
    assert figures["none"]["flags"]["cached_latents"] is True


@dataclass
class Fits:
    """As much of a report as the search reads."""

    size: int
    memory: Memory


def tries_of(largest: int, start: int, memory: Callable[[int], float]) -> list[int]:
    """The sizes that the search tries until it has found that one, or beyond 16 one at most an eighth smaller."""
    tried: list[int] = []
    capacity = (memory(largest) + memory(largest + 1)) / 2

    def report_of(size: int) -> Any:
        assert size not in tried
        tried.append(size)
        fits = memory(size) <= capacity
        return Fits(size, Memory(0, 0, 0, 0, 0, peak=int(memory(size)))) if fits else None

    found: Any = search(report_of, start, capacity)
    assert 0 <= largest - found.size <= (largest // 8 if largest > 16 else 0)
    return tried


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 7, 8, 13, 15, 16])
@pytest.mark.parametrize("start", [1, 2, 8])
@pytest.mark.parametrize("grows", [1.0, 0.7, 1.3])
def test_the_search_finds_the_largest_batch(largest: int, start: int, grows: float) -> None:
    assert len(tries_of(largest, start, lambda size: 8e9 + 6e8 * size**grows)) <= 9


def test_the_search_goes_where_memory_says() -> None:
    """The figures are those of Stable Diffusion on a v4: 0.58 GiB an image."""
    assert tries_of(41, 4, lambda size: 7.4e9 + 6.2e8 * size) == [4, 8, 41, 46]


@pytest.mark.parametrize("largest", [1, 3, 16, 40, 41, 100, 1000])
@pytest.mark.parametrize("start", [1, 4])
@pytest.mark.parametrize(
    "memory",
    [
        lambda size: 8e9 + 1e6 * math.ceil(size / 8) + size / 1e3,  # images in rows of eight
        lambda size: 8e9 + (2e6 * size if size < 8 else 6e8 * size),  # another form of convolutions from eight on
    ],
)
def test_the_search_is_not_led_astray(largest: int, start: int, memory: Callable[[int], float]) -> None:
    """By memory that hardly grows from one size to the next: no try is far beyond what fits."""
    tried = tries_of(largest, start, memory)
    assert max(tried) <= max(8 * largest, start)
    assert len(tried) <= 16


def test_the_search_goes_on_carefully_where_the_compiler_saves() -> None:
    """The figures are those of the tiny model at 1024 px on a v5e: 3 images need less than 2."""
    needed = {1: 7.64e9, 2: 14.49e9, 3: 11.08e9, 4: 14.71e9}
    assert tries_of(4, 1, lambda size: needed.get(size, 17e9)) == [1, 2, 3, 6, 4, 5]


def test_the_search_finds_nothing_where_nothing_fits() -> None:
    assert search(lambda size: None, 4, 1e9) is None
