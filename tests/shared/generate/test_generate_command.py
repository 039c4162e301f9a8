"""Mistakes of whoever asks for pictures: each is a sentence before a model is loaded, which no test here has."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flax_trainer.generate
import torch_trainer.generate
from shared.diffusion.control import Strength
from shared.generate import command
from shared.generate.command import print_help, read_command
from shared.generate.options import GENERATE_FLAGS
from tests.shared.generate.conftest import write_controlnet_config
from tests.shared.generate.jobs import PROMPT, prepared


def test_a_runs_folder_names_its_base_model_and_size(run: Path, condition: Path, base_model: Path) -> None:
    job = prepared(run, condition, "--num_images_per_prompt", 2)
    assert job.models.config.pretrained_model_name_or_path == str(base_model)
    assert (job.drawing.height, job.drawing.width, job.drawing.seed) == (64, 64, 0)
    assert job.conditions_GHWN.shape == (1, 64, 64, 3)
    assert [(request.number, request.prompt) for request in job.requests] == [(0, PROMPT), (1, PROMPT)]
    wide = prepared(run, condition, "--height", 64, "--width", 96)
    assert wide.conditions_GHWN.shape == (1, 64, 96, 3)


def test_without_a_run_the_size_is_the_base_models(run: Path, condition: Path, base_model: Path) -> None:
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path is missing"):
        prepared(run, condition)
    job = prepared(run, condition, "--pretrained_model_name_or_path", base_model)
    unet = json.loads((base_model / "unet" / "config.json").read_text())
    vae = json.loads((base_model / "vae" / "config.json").read_text())
    side = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    assert (job.drawing.height, job.drawing.width) == (side, side)


def test_conditions_are_those_that_the_run_was_trained_on(run: Path, tmp_path: Path) -> None:
    """Grey ones of one channel, and maps of labels whose colours do not mix."""
    labels = np.random.default_rng(0).choice(np.uint8([0, 90, 200]), (50, 50))
    Image.fromarray(labels).save(tmp_path / "labels.png")
    controlnet = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(controlnet | {"conditioning_channels": 1}))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace("conditioning_interpolation: null", "conditioning_interpolation: nearest")
    )
    job = prepared(run, tmp_path / "labels.png")
    assert job.conditions_GHWN.shape == (1, 64, 64, 1)
    assert set(np.unique(job.conditions_GHWN)) == {0, 90, 200}


def test_a_checkpoints_channels_are_told_by_its_run(run: Path, condition: Path) -> None:
    (run / "config.json").unlink()
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "anything").touch()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("conditioning_channels:\n- 3", "conditioning_channels:\n- 1"))
    job = prepared(run / "checkpoint-3", condition)
    assert job.conditions_GHWN.shape == (1, 64, 64, 1)
    (architecture,) = job.models.architectures
    assert architecture.conditioning_channels == 1


def test_a_controlnet_of_other_channels_than_pictures_have(run: Path, condition: Path) -> None:
    controlnet = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(controlnet | {"conditioning_channels": 4}))
    with pytest.raises(ValueError, match=r"takes conditions of 4 channels .*: say with --conditioning_channels"):
        prepared(run, condition)
    with pytest.raises(ValueError, match=r"channels 3 3 come to 6 channels, and the ControlNet in .* takes 4"):
        prepared(run, condition, "--conditioning_channels", 3, 3)


def test_a_decoder_that_was_trained_comes_with_its_controlnet(run: Path, condition: Path, base_model: Path) -> None:
    assert prepared(run, condition).models.unet is None
    shutil.copytree(base_model / "unet", run / "unet")
    source = prepared(run, condition).models.unet
    assert source is not None
    assert source.file() == run / "unet" / "config.json"
    config = json.loads(source.file().read_text())
    source.file().write_text(json.dumps(config | {"layers_per_block": 3}))
    with pytest.raises(ValueError, match="of another architecture"):
        prepared(run, condition)


def test_several_controlnets_take_a_condition_each(run: Path, condition: Path, base_model: Path) -> None:
    """Of one channel here and three there; a run tells the base model for all."""
    other = run.parent / "other"
    write_controlnet_config(other, base_model)
    controlnet = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(controlnet | {"conditioning_channels": 1}))
    both = ["--controlnet_model_name_or_path", other, run, "--conditioning_image", condition, condition]
    strengths = ["--controlnet_conditioning_scale", 0.5, 0.8, "--control_guidance_end", 0.6]
    job = prepared(run, condition, *both, *strengths, "--annotate", "canny", "none")
    assert job.conditions_GHWN.shape == (1, 64, 64, 4)
    assert not job.conditions_GHWN[..., 0].any(), "there is no edge in a picture of one colour"
    assert job.drawing.control.strengths == (Strength(0.5, end=0.6), Strength(0.8, end=0.6))
    assert job.models.config.pretrained_model_name_or_path == str(base_model)
    with pytest.raises(ValueError, match="names 1 images, and there are 2 conditions"):
        prepared(run, condition, *both[:4], condition)
    with pytest.raises(ValueError, match=r"--controlnet_conditioning_scale has 3 values, and .* names 2"):
        prepared(run, condition, *both, "--controlnet_conditioning_scale", 1, 2, 3)
    with pytest.raises(ValueError, match=r"--control_guidance_start is 0\.7 and --control_guidance_end 0\.6"):
        prepared(run, condition, *both, *strengths, "--control_guidance_start", 0, 0.7)
    with pytest.raises(ValueError, match=r"3 1 come to 4 channels, and .*other takes 1, .*run takes 3"):
        prepared(run, condition, *both, "--conditioning_channels", 3, 1)
    assert prepared(run, condition, *both, "--conditioning_channels", 1, 3).conditions_GHWN.shape == (1, 64, 64, 4)


def test_controlnets_of_two_base_models(run: Path, condition: Path, base_model: Path) -> None:
    other = run.parent / "other"
    shutil.copytree(run, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace(str(base_model), "elsewhere/base"))
    both = ["--controlnet_model_name_or_path", run, other, "--conditioning_image", condition, condition]
    with pytest.raises(ValueError, match=r"began with different base models \(.*, elsewhere/base\)"):
        prepared(run, condition, *both)
    shutil.copytree(base_model / "unet", run / "unet")
    shutil.copytree(base_model / "unet", other / "unet")
    with pytest.raises(ValueError, match="each come with a UNet"):
        prepared(run, condition, *both, "--pretrained_model_name_or_path", base_model)


def test_a_checkpoint_with_a_decoder_is_named_first(run: Path, condition: Path) -> None:
    other = run.parent / "other"
    shutil.copytree(run, other)
    (other / "checkpoint-3").mkdir()
    (other / "checkpoint-3" / "anything").touch()
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("sd_unlocked: false", "sd_unlocked: true"))
    both = ["--conditioning_image", condition, condition, "--controlnet_model_name_or_path"]
    with pytest.raises(ValueError, match=r"checkpoint-3 has a UNet's decoder .*: name it first"):
        prepared(run, condition, *both, run, other / "checkpoint-3")
    assert len(prepared(run, condition, *both, other / "checkpoint-3", run).models.controlnets) == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--resolution", "60"], "--resolution is 60.*multiples of 8"),
        (["--height", "64", "--width", "100"], "--width is 100.*Use 104 or 96"),
        (["--height", "64"], "--height and --width go together"),
        (["--height", "64", "--width", "64", "--resolution", "64"], "leave it out"),
        (["--conditioning_image", "nowhere.png"], "no file nowhere.png"),
        (["--prompt_file", "prompts.txt"], "keep one"),
        (["--scheduler", "heun"], "unipc, ddim, euler, dpmsolver"),
        (["--num_inference_steps", "0"], "1 or more"),
        (["--num_inference_steps", "1001"], "1 to 1000"),
        (["--batch_size", "-1"], "1 or more"),
        (["--num_images_per_prompt", "0"], "1 or more"),
        (["--seed", "-1"], "--seed"),
        (["--guidance_scale", "inf"], "finite"),
        (["--control_guidance_start", "0.5", "--control_guidance_end", "0.5"], "start before the end"),
        (["--control_guidance_end", "1.5"], "in the range from 0"),
        (["--negative_prompt", "blurry", "--guidance_scale", "1"], "--negative_prompt has no effect"),
        (["--controlnet_model_name_or_path", "nowhere/at/all"], "nowhere/at/all"),
        (["--control_guidance_end", "1", "0.5"], "--control_guidance_end has 2 values, and .* names 1"),
        (["--annotate", "canny", "none"], "--annotate names 2 annotations, and a picture has 1 conditions"),
        (["--annotate", "depth"], "canny"),
        (["--pretrained_model_name_or_path", "nowhere/at/all"], "nowhere/at/all"),
        (["--output_dir", "gs://bucket/pictures"], "an address"),
        (["--promt", "x"], "did you mean --prompt"),
        (["word"], "takes one value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_first(run: Path, condition: Path, more: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        prepared(run, condition, *more)


def test_more_prompts_than_conditions(run: Path, condition: Path) -> None:
    prompts = ["--prompt", "one", "two", "three"]
    assert [request.condition for request in prepared(run, condition, *prompts).requests] == [0, 0, 0]
    with pytest.raises(ValueError, match="3 prompts and 2 condition images"):
        prepared(run, condition, *prompts, "--conditioning_image", condition, condition)


def test_what_is_needed_is_asked_for(run: Path, condition: Path) -> None:
    words = ["--controlnet_model_name_or_path", str(run), "--conditioning_image", str(condition), "--prompt", PROMPT]
    for place in (0, 2, 4):
        with pytest.raises(ValueError, match=f"{words[place]} is missing"):
            read_command(words[:place] + words[place + 2 :])
    assert read_command([*words[:-1], ""]).prompt == ("",)


def test_a_condition_that_cannot_be_read(run: Path, condition: Path) -> None:
    condition.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    with pytest.raises(ValueError, match=r"condition\.png cannot be used: .*EPS"):
        prepared(run, condition)
    Image.fromarray(np.zeros((1, 10_000, 3), np.uint8)).save(condition)
    with pytest.raises(ValueError, match="pixels"):  # as high as asked for, it is much wider
        prepared(run, condition, "--resolution", "4096")


def test_a_controlnet_of_another_kind_of_model(xl_model: Path, run: Path, condition: Path) -> None:
    with pytest.raises(ValueError, match=r"is a ControlNet for Stable Diffusion 1\.x or 2\.x: expected one for"):
        prepared(run, condition, "--pretrained_model_name_or_path", xl_model)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 96}))
    with pytest.raises(ValueError, match="do not belong together: the text features"):
        prepared(run, condition)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("resolution: 0", r"config\.yaml: --resolution must be 1 or more"),
        ("resolution: 1000000000", r"config\.yaml: --resolution"),
        ("image_interpolation_mode: sideways", r"config\.yaml: --image_interpolation_mode"),
        ("pretrained_model_name_or_path: null", "--pretrained_model_name_or_path is missing"),
        ("pretrained_model_name_or_path: ''", r"config\.yaml: --pretrained_model_name_or_path was given an empty"),
        ("pretrained_model_name_or_path: /nowhere/at/all", "/nowhere/at/all"),
        ("colour: red", "colour is not a flag"),
        ("- a list", "one `flag: value` per line"),
    ],
)
def test_a_runs_configuration_that_is_no_use(run: Path, condition: Path, change: str, says: str) -> None:
    path = run / "config.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(change.partition(" ")[0])]
    path.write_text("\n".join([change] if change.startswith("-") else [*lines, change]))
    with pytest.raises(ValueError, match=says):
        prepared(run, condition)


def test_a_base_model_that_asks_for_monstrous_pictures(
    base_model: Path, run: Path, condition: Path, tmp_path: Path
) -> None:
    (run / "config.yaml").unlink()
    copy = tmp_path / "copy"
    shutil.copytree(base_model, copy)
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 4096}))
    with pytest.raises(ValueError, match=r"asks for pictures of \d+x\d+ pixels"):
        prepared(run, condition, "--pretrained_model_name_or_path", copy)
    prepared(run, condition, "--pretrained_model_name_or_path", copy, "--resolution", 64)


def test_a_run_that_has_not_ended(run: Path, condition: Path) -> None:
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match="has not left its ControlNet yet"):
        prepared(run, condition)


def test_a_scheduler_without_such_a_plan(base_model: Path, run: Path, condition: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base_model, copy)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_karras_sigmas": True}))
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        prepared(run, condition, "--pretrained_model_name_or_path", copy, "--scheduler", "euler")


@pytest.mark.parametrize("program", [flax_trainer.generate, torch_trainer.generate])
def test_mistakes_end_with_2_and_one_line(program: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--prompt", "x"]) == 2  # type: ignore[attr-defined]
    said = capsys.readouterr()
    assert said.err.startswith("error: --controlnet_model_name_or_path is missing")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "read_command", interrupted)
    assert flax_trainer.generate.main([]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    print_help("torch")
    text = capsys.readouterr().out
    assert [name for name in GENERATE_FLAGS if f"--{name}" not in text] == []
    assert torch_trainer.generate.main(["--help"]) == 0
    assert capsys.readouterr().out == text
