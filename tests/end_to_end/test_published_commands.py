"""The command lines of diffusers' guides and of MindONE's port train as published, on tiny files of the same names."""

import io
from pathlib import Path

import datasets
import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.config import TrainConfig, parse_command_line
from shared.data.sources.circles import draw
from shared.diffusion.samplers import initial_latents
from tests.end_to_end.support.running import (
    launch_torch,
    main_of_train_torch,
    metrics,
    train_flax,
    train_flax_here,
    train_torch_here,
)
from tests.end_to_end.support.tiny_runs import SIZE
from tests.shared.config.published_commands import FACES, FLAX_COMMANDS, TORCH_COMMANDS, XL_COMMANDS

STEPS = 2
LEARNS_FAST = "SDXL, 24 GB"  # in the test of its pictures

# What a machine for tests lacks. `test_what_is_left_out_says_why` has what these flags do there.
LEFT_OUT = {
    "--push_to_hub": "needs the network and a login",
    "--hub_model_id=controlnet-fill-circle": "goes with --push_to_hub",
    "--enable_xformers_memory_efficient_attention": "needs xFormers and a GPU",
}
# (what the command says, what is said after it, where later flags win)
REPLACED = (
    ("wandb", "--report_to=none"),  # needs a login
    ("fp16", "--mixed_precision=bf16"),  # needs a GPU
    ("512", f"--resolution={SIZE}"),
    ("1024", f"--resolution={SIZE}"),
    ("", f"--max_train_steps={STEPS}"),
    ("", "--num_validation_images=1"),  # as published, 4 of each pair
)
CHANGED_FLAGS = {
    *("push_to_hub", "hub_model_id", "enable_xformers_memory_efficient_attention"),
    *("report_to", "mixed_precision", "resolution", "max_train_steps", "output_dir"),
}


def local(command: list[str]) -> list[str]:
    kept = [word for word in command if word not in LEFT_OUT]
    return kept + [flag for said, flag in REPLACED if any(word.endswith(said) for word in kept)]


# The Flax guide's other commands differ in flags that the PyTorch backend tries here and other tests try in Flax.
FLAX = {name: FLAX_COMMANDS[name] for name in ("fill50k", "streaming")} | {"12 GB": TORCH_COMMANDS["12 GB"]}


@pytest.fixture(scope="session")
def files(base_model: Path, xl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guides' commands find in their folder or on the Hub, under the same names."""
    folder = tmp_path_factory.mktemp("published")
    for model in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1-base"):
        (folder / model).parent.mkdir()
        (folder / model).symlink_to(base_model)
    (folder / "stabilityai" / "stable-diffusion-xl-base-1.0").symlink_to(xl_model)
    write_dataset(folder / "fusing" / "fill50k", ("image", "conditioning_image", "text"))
    write_dataset(folder / FACES, ("image", "spiga_seg", "image_caption"))
    for index in (1, 2):
        draw(index, SIZE, seed=1).conditioning_image.save(folder / f"conditioning_image_{index}.png")
    for index in (1, 2, 3):
        draw(index, SIZE, seed=2).conditioning_image.save(folder / f"face_landmarks{index}.jpeg")
    unet = diffusers.UNet2DConditionModel.from_pretrained(base_model / "unet")
    diffusers.ControlNetModel.from_unet(unet).save_pretrained(folder / "control_out" / "500")
    return folder


def write_dataset(folder: Path, columns: tuple[str, str, str]) -> None:
    """Eight circles in a folder that `datasets` loads as it does a repository of the Hub."""
    drawn = [draw(index, SIZE, seed=0) for index in range(8)]
    image, condition, caption = columns
    rows = {
        image: [{"bytes": png(circle.image), "path": None} for circle in drawn],
        condition: [{"bytes": png(circle.conditioning_image), "path": None} for circle in drawn],
        caption: [circle.truth.caption for circle in drawn],
    }
    features = {image: datasets.Image(), condition: datasets.Image(), caption: datasets.Value("string")}
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(folder / "data" / "train-0.parquet")


def png(image: PIL.Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, format="png")
    return content.getvalue()


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command runs in."""
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def assert_trained_as_told(here: Path, command: list[str], backend: str) -> None:
    """The run did its steps with every flag that the command gives, and left what the guide promises."""
    (report,) = (path for path in here.rglob("report.json"))
    run = report.parent
    assert [entry["step"] for entry in metrics(run)] == list(range(1, STEPS + 1))
    config = parse_command_line(command, backend)
    done = yaml.safe_load((run / "config.yaml").read_text())
    for word in command:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name not in CHANGED_FLAGS:
            expected = getattr(config, name)
            assert done[name] == (list(expected) if isinstance(expected, tuple) else expected), name
    assert metrics(run)[-1]["learning_rate"] == config.learning_rate
    if config.validation_image is not None:
        pictures = [path.name for path in sorted((run / "validation" / f"step-{STEPS}").iterdir())]
        assert pictures == [f"{index}.png" for index in range(len(config.validation_image))]
    diffusers.ControlNetModel.from_pretrained(run)


@pytest.mark.parametrize("name", [name for name in TORCH_COMMANDS if name not in ("first", LEARNS_FAST)])
def test_published_pytorch_command_trains(name: str, here: Path) -> None:
    train_torch_here(local(TORCH_COMMANDS[name]))
    assert_trained_as_told(here, TORCH_COMMANDS[name], "torch")


def test_published_command_trains_under_accelerate_launch(here: Path) -> None:
    launch_torch([], local(TORCH_COMMANDS["first"]), folder=here)
    assert_trained_as_told(here, TORCH_COMMANDS["first"], "torch")


@pytest.mark.parametrize("name", FLAX_COMMANDS)
def test_published_flax_command_trains_in_pytorch(name: str, here: Path) -> None:
    train_torch_here(local(FLAX_COMMANDS[name]))
    assert_trained_as_told(here, FLAX_COMMANDS[name], "torch")


@pytest.mark.parametrize("name", FLAX)
def test_published_flax_command_trains(name: str, here: Path) -> None:
    train_flax(local(FLAX[name]), folder=here)
    assert_trained_as_told(here, FLAX[name], "flax")


@pytest.mark.parametrize("name", [name for name in XL_COMMANDS if name != LEARNS_FAST])
def test_published_pytorch_command_for_xl_trains_in_flax(name: str, here: Path) -> None:
    train_flax_here(local(XL_COMMANDS[name]))
    assert_trained_as_told(here, XL_COMMANDS[name], "flax")
    assert "StableDiffusionXLControlNetPipeline" in next(here.rglob("README.md")).read_text()


@pytest.mark.parametrize("backend", ["flax", "torch"])
def test_diffusers_draws_what_a_published_xl_command_drew_last(backend: str, here: Path, xl_model: Path) -> None:
    """With the ControlNet of the run's folder, where it learned enough for that to show, in float32."""
    command = [*XL_COMMANDS[LEARNS_FAST], "--learning_rate=1e-2"]
    train = {"flax": train_flax_here, "torch": train_torch_here}[backend]
    train([*local(command), "--learning_rate=1e-2", "--mixed_precision=no", "--report_to=tensorboard"])
    assert_trained_as_told(here, command, backend)
    run = here / "controlnet-model"
    theirs = drawn_by_diffusers(xl_model, run, parse_command_line(command, backend))
    events = EventAccumulator(str(run / "logs" / "train_controlnet"), size_guidance={"images": 0}).Reload()
    for pair, expected in enumerate(theirs):
        encoded = events.Images(f"validation/{pair}/1")[-1]
        assert encoded.step == STEPS
        ours = np.asarray(PIL.Image.open(io.BytesIO(encoded.encoded_image_string)), np.float32) / 255
        assert np.abs(ours - expected).max() < 2 / 255
    uncontrolled = drawn_by_diffusers(xl_model, run, parse_command_line(command, backend), conditioning_scale=0.0)
    assert np.abs(theirs - uncontrolled).max() > 20 / 255


def drawn_by_diffusers(base: Path, run: Path, config: TrainConfig, *, conditioning_scale: float = 1.0) -> np.ndarray:
    """float32 [R, H, W, 3] in [0, 1], of each pair of prompt and condition one."""
    assert config.validation_prompt is not None
    assert config.validation_image is not None
    pipeline = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(
        base, controlnet=diffusers.ControlNetModel.from_pretrained(run), add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    latents_BHWC = initial_latents(config.seed, range(len(config.validation_prompt)), (SIZE // 8, SIZE // 8, 4))
    return pipeline(
        list(config.validation_prompt),
        image=[PIL.Image.open(path).convert("RGB") for path in config.validation_image],
        latents=torch.from_numpy(latents_BHWC).permute(0, 3, 1, 2),
        height=SIZE,
        width=SIZE,
        num_inference_steps=20,
        guidance_scale=config.guidance_scale,
        controlnet_conditioning_scale=conditioning_scale,
        output_type="np",
    ).images


@pytest.mark.parametrize(
    ("name", "words"),
    [("12 GB", "pip install xformers"), ("8 GB", "--mixed_precision bf16"), ("many GPUs", "--mixed_precision bf16")],
)
def test_what_is_left_out_says_why(name: str, words: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    as_published = [word for word in TORCH_COMMANDS[name] if "wandb" not in word]
    assert main_of_train_torch([*as_published, f"--resolution={SIZE}"]) == 2
    message = capfd.readouterr().err
    assert words in message
    assert "Traceback" not in message
