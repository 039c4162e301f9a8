"""The command that draws: pictures of diffusers' pipelines given the same noise, and the same on both backends."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

import flax_trainer.evaluate
import flax_trainer.generate
import flax_trainer.pipeline
import torch_trainer.evaluate
import torch_trainer.generate
from flax_trainer.evaluation.image_sampler import ImageSampler
from shared.diffusion.samplers import initial_latents
from tests.torch_trainer.tiny_training import ROOT, awaken, configuration, forget_accelerate_state
from torch_trainer.base_models import load_base_models
from torch_trainer.evaluation.image_sampler import ImageSampler as TorchImageSampler

DEMO_MODEL = ROOT / "shared" / "demo_model"
PROMPTS = ["red circle with blue background", "a cyan circle", "green circle with white background"]
SEED, STEPS, GUIDANCE = 11, 4, 3.0
SCHEDULERS = {
    "unipc": diffusers.UniPCMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
}
NOTHING_SPECIAL: dict[str, Any] = {}
EVERYTHING = {
    "scheduler": "euler",
    "guess_mode": True,
    "control_guidance_end": 0.8,
    "controlnet_conditioning_scale": 0.7,
    "negative_prompt": "a black circle",
    "height": 48,
    "width": 80,
}


@dataclass(frozen=True)
class Models:
    """A base model and what was trained on it, as folders: a ControlNet, or several that steer together."""

    base: Path
    controlnets: tuple[Path, ...]
    pipeline: Any


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    forget_accelerate_state()
    yield
    forget_accelerate_state()
    torch.set_num_threads(threads)
    jax.config.update("jax_default_matmul_precision", None)


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """The command leaves one behind that writes to the captured output of a test."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return models_of(DEMO_MODEL, tmp_path_factory.mktemp("controlnet"), diffusers.StableDiffusionControlNetPipeline)


@pytest.fixture(scope="module")
def xl(xl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return models_of(xl_model, tmp_path_factory.mktemp("controlnet"), diffusers.StableDiffusionXLControlNetPipeline)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("controlnets")
    return models_of(DEMO_MODEL, folder, diffusers.StableDiffusionControlNetPipeline, (SEED, SEED + 1))


def models_of(base: Path, folder: Path, pipeline_class: Any, seeds: tuple[int, ...] = (SEED,)) -> Models:
    controlnets = [awake_controlnet(base, seed) for seed in seeds]
    folders = tuple(folder / str(seed) for seed in seeds)
    for controlnet, place in zip(controlnets, folders, strict=True):
        controlnet.save_pretrained(place)
    is_xl = pipeline_class is diffusers.StableDiffusionXLControlNetPipeline
    options: dict[str, Any] = {"add_watermarker": False} if is_xl else {"safety_checker": None}
    given = controlnets if len(controlnets) > 1 else controlnets[0]
    pipeline = pipeline_class.from_pretrained(base, controlnet=given, **options)
    pipeline.set_progress_bar_config(disable=True)
    return Models(base, folders, pipeline)


def awake_controlnet(base: Path, seed: int) -> Any:
    controlnet = load_base_models(configuration(base, seed=seed), torch.float32).controlnet
    awaken(controlnet, seed)
    with torch.no_grad():  # Untrained, these layers let next to nothing of a condition through.
        for name, param in controlnet.controlnet_cond_embedding.named_parameters():
            param.mul_(3 if name.endswith("weight") else 1)
    return controlnet


def conditions(options: Mapping[str, Any], of: int = 0) -> list[Image.Image]:
    """Discs at different places, for each ControlNet others."""
    height, width = options.get("height", 64), options.get("width", 64)
    rows, columns = np.mgrid[:height, :width]
    discs = [(rows - height / (2 + of)) ** 2 + (columns - centre) ** 2 < 150 for centre in (20, 32, 44)]
    return [Image.fromarray(np.where(disc[..., None], 255, 0).repeat(3, axis=-1).astype(np.uint8)) for disc in discs]


def generated(program: Any, models: Models, folder: Path, options: Mapping[str, Any], *more: object) -> np.ndarray:
    """uint8 [R,H,W,3], as the command leaves them."""
    folders = [folder / str(number) for number in range(len(models.controlnets))]
    for number, place in enumerate(folders):
        place.mkdir(parents=True)
        for index, condition in enumerate(conditions(options, number)):
            condition.save(place / f"condition{index}.png")
    what = ["--conditioning_image", *folders, "--prompt", *PROMPTS]
    words = [*what, *common_words(models, options), "--output_dir", folder / "pictures", *more]
    exit_code = program.main([*map(str, words)])
    assert exit_code == 0
    return np.stack([np.asarray(Image.open(folder / "pictures" / f"{number:03}.png")) for number in range(3)])


def common_words(models: Models, options: Mapping[str, Any]) -> list[object]:
    """Which models draw, and how."""
    size = [] if "height" in options else ["--resolution", 64]
    flags = [
        word
        for name, value in options.items()
        for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]
    return [
        *("--pretrained_model_name_or_path", models.base, "--controlnet_model_name_or_path", *models.controlnets),
        *("--seed", SEED, "--num_inference_steps", STEPS, "--guidance_scale", GUIDANCE, *size, *flags),
    ]


def evaluated(program: Any, models: Models, folder: Path, options: Mapping[str, Any]) -> dict[str, float]:
    """The figures of these pictures, which it draws itself, with the conditions as truths."""
    (folder / "data").mkdir(parents=True)
    rows = []
    for index, (prompt, condition) in enumerate(zip(PROMPTS, conditions(options), strict=True)):
        condition.save(folder / "data" / f"{index}.png")
        rows.append({"source": f"{index}.png", "target": f"{index}.png", "prompt": prompt})
    (folder / "data" / "prompt.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    what = ["--eval_data", folder / "data", "--metrics", "edges", "colours", "--output_dir", folder / "out"]
    exit_code = program.main([*map(str, [*what, *common_words(models, options)])])
    assert exit_code == 0
    metrics = json.loads((folder / "out" / "evaluation.json").read_text())["metrics"]
    return {name: figure["value"] for one in metrics.values() for name, figure in one["found"]["figures"].items()}


def drawn_by_diffusers(models: Models, options: Mapping[str, Any]) -> np.ndarray:
    """float [R,H,W,3], 0 to 255."""
    pipeline, others = models.pipeline, dict(options)
    pipeline.scheduler = SCHEDULERS[others.pop("scheduler", "unipc")].from_config(pipeline.scheduler.config)
    height, width = others.pop("height", 64), others.pop("width", 64)
    if "negative_prompt" in others:
        others["negative_prompt"] = [others["negative_prompt"]] * len(PROMPTS)
    images = [conditions(options, number) for number in range(len(models.controlnets))]
    vae_factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    latents_BHWC = initial_latents(SEED, [0, 1, 2], (height // vae_factor, width // vae_factor, 4))
    images: np.ndarray = pipeline(
        PROMPTS,
        image=images[0] if len(images) == 1 else list(map(list, zip(*images, strict=True))),
        num_inference_steps=STEPS,
        latents=torch.from_numpy(latents_BHWC).permute(0, 3, 1, 2),
        height=height,
        width=width,
        output_type="np",
        **({"guidance_scale": GUIDANCE} | others),
    ).images
    return images * 255


@pytest.mark.parametrize(
    "options",
    [
        {"scheduler": "unipc"},
        {"scheduler": "ddim"},
        {"scheduler": "euler"},
        {"scheduler": "dpmsolver++"},
        {"guess_mode": True},
        {"guess_mode": True, "guidance_scale": 1.0},
        {"control_guidance_start": 0.25, "control_guidance_end": 0.75},
        {"controlnet_conditioning_scale": 0.5},
        {"negative_prompt": "a black circle"},
        {"height": 48, "width": 80},
        EVERYTHING,
    ],
    ids=lambda options: " ".join(options if len(options) > 1 else map(str, options.values())),
)
def test_they_are_those_of_diffusers_pipeline(sd: Models, tmp_path: Path, options: dict[str, Any]) -> None:
    ours = generated(torch_trainer.generate, sd, tmp_path / "drawn", options, "--batch_size", 3)
    theirs = drawn_by_diffusers(sd, options)
    assert theirs.std() > 10, "a blank picture compares to anything"
    assert np.abs(ours - theirs).mean() < 0.5


@pytest.mark.parametrize("options", [{"scheduler": "euler"}, {"negative_prompt": ""}, EVERYTHING], ids=len)
def test_those_of_xl_too(xl: Models, tmp_path: Path, options: dict[str, Any]) -> None:
    ours = generated(torch_trainer.generate, xl, tmp_path / "drawn", options, "--batch_size", 3)
    theirs = drawn_by_diffusers(xl, options)
    assert theirs.std() > 10
    assert np.abs(ours - theirs).mean() < 0.5


TOGETHER = {"controlnet_conditioning_scale": [0.5, 0.8], "control_guidance_start": [0.0, 0.5]}


@pytest.mark.parametrize("options", [TOGETHER, TOGETHER | {"guess_mode": True}], ids=["", "guess_mode"])
def test_several_controlnets_steer_together(two: Models, tmp_path: Path, options: dict[str, Any]) -> None:
    ours = generated(torch_trainer.generate, two, tmp_path / "drawn", options, "--batch_size", 3)
    theirs = drawn_by_diffusers(two, options)
    assert np.abs(ours - theirs).mean() < 0.5
    for number in range(2):  # without which the comparison would prove little
        scales = {"controlnet_conditioning_scale": [0.5, 0.0] if number else [0.0, 0.8]}
        assert np.abs(drawn_by_diffusers(two, options | scales) - theirs).mean() > 0.5


def test_every_option_draws_another_picture(sd: Models) -> None:
    """Without which the comparisons would prove little."""
    plain = drawn_by_diffusers(sd, NOTHING_SPECIAL)
    for name, value in EVERYTHING.items():
        if name not in ("height", "width"):
            other = drawn_by_diffusers(sd, {name: value})
            assert np.abs(other - plain).mean() > 0.5, name


def test_the_python_way_draws_what_the_command_draws(
    sd: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called as diffusers' pipeline; another seed and other words need no other program."""
    expected = generated(flax_trainer.generate, sd, tmp_path / "drawn", EVERYTHING)
    options = dict(EVERYTHING)
    pipeline = flax_trainer.pipeline.FlaxStableDiffusionControlNetPipeline.from_pretrained(
        sd.base, controlnet=sd.controlnets[0], scheduler=options.pop("scheduler")
    )
    options |= {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}

    programs: list[Any] = []

    class Counted(ImageSampler):
        def __init__(self, *args: Any, **kwargs: Any):
            programs.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(flax_trainer.pipeline, "ImageSampler", Counted)

    def drawn(**more: Any) -> np.ndarray:
        images = pipeline(PROMPTS, conditions(EVERYTHING), **(options | more)).images
        return np.stack([np.asarray(image) for image in images]).astype(int)

    given = drawn(seed=SEED)
    assert given.shape == expected.shape
    assert np.abs(given - expected).max() <= 1
    for other in ({"seed": SEED + 1}, {"seed": SEED, "negative_prompt": "a red circle"}):
        assert np.abs(drawn(**other) - expected).mean() > 0.5
    assert len(programs) == 1
    with pytest.raises(ValueError, match="multiples of 8"):
        pipeline(PROMPTS[0], conditions({"height": 50, "width": 64})[0])
    with pytest.raises(ValueError, match="--guidance_scale"):
        drawn(guidance_scale=-1.0)


@pytest.mark.parametrize(
    ("program", "sampler", "error"),
    [
        (flax_trainer.generate, ImageSampler, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory …")),
        (torch_trainer.generate, TorchImageSampler, torch.OutOfMemoryError("CUDA out of memory …")),
    ],
    ids=["flax", "torch"],
)
def test_a_small_memory_is_a_sentence(
    program: Any,
    sampler: type,
    error: Exception,
    sd: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_much(*args: Any) -> None:
        raise error

    monkeypatch.setattr(sampler, "__call__", too_much)
    with pytest.raises(AssertionError):
        generated(program, sd, tmp_path / "drawn", NOTHING_SPECIAL, "--batch_size", 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: The models, and the pictures of 64x64 pixels")
    assert "--batch_size below 2 or --mixed_precision bf16" in last


@pytest.mark.parametrize(("kind", "options"), [("sd", EVERYTHING), ("xl", EVERYTHING), ("two", EVERYTHING | TOGETHER)])
def test_flax_draws_the_same_on_eight_devices(
    kind: str, options: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Three pictures, of which each is alone on its device here, and all are together there."""
    models = request.getfixturevalue(kind)
    expected = generated(torch_trainer.generate, models, tmp_path / "torch", options, "--batch_size", 2)
    given = generated(flax_trainer.generate, models, tmp_path / "flax", options)
    assert np.abs(given.astype(int) - expected).mean() < 0.5


def test_an_evaluation_draws_what_the_command_draws_and_measures_the_same(sd: Models, tmp_path: Path) -> None:
    expected = generated(flax_trainer.generate, sd, tmp_path / "drawn", EVERYTHING).astype(int)
    figures = {
        name: evaluated(program, sd, tmp_path / name, EVERYTHING)
        for name, program in (("flax", flax_trainer.evaluate), ("torch", torch_trainer.evaluate))
    }
    for name in figures:
        pictures = [Image.open(tmp_path / name / "out" / "pictures" / f"00000{number}.png") for number in range(3)]
        assert np.abs(np.stack([np.asarray(picture) for picture in pictures]) - expected).mean() < 0.5
    assert list(figures["flax"]) == ["edge_f1", "edge_precision", "edge_recall", "edge_ssim", "colour_difference"]
    assert figures["torch"] == pytest.approx(figures["flax"], abs=0.01)
    assert figures["flax"]["edge_f1"] > 0.01
