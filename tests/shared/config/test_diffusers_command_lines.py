"""Command lines written for diffusers' scripts: every flag exists, and the published examples parse."""

import pathlib

import pytest

from shared.config import Backend, parse_command_line
from shared.config.arguments import read_arguments, value_of
from shared.config.options import FLAGS
from tests.shared.config.published_commands import FACES, FLAX_COMMANDS, TORCH_COMMANDS, XL_COMMANDS

_LISTED = pathlib.Path(__file__).with_name("diffusers_flags.txt").read_text(encoding="utf-8").splitlines()
_DIFFUSERS_FLAGS = [tuple(line.split(" | ")) for line in _LISTED if not line.startswith("#")]


@pytest.mark.parametrize(("name", "type_name", "scripts"), _DIFFUSERS_FLAGS)
def test_each_flag_of_diffusers_exists_with_its_type(name: str, type_name: str, scripts: str) -> None:
    takes_several = name == "conditioning_image_column"  # of which theirs has one
    assert FLAGS[name].type_name.removesuffix(" | None") == type_name + " list" * takes_several, scripts


@pytest.mark.parametrize("argv", TORCH_COMMANDS.values(), ids=TORCH_COMMANDS)
def test_published_pytorch_commands_parse_on_both_backends(argv: list[str]) -> None:
    assert parse_command_line(argv, "torch").dataset_name in ("fusing/fill50k", FACES)
    assert parse_command_line(argv, "flax").dataset_name in ("fusing/fill50k", FACES)


@pytest.mark.parametrize("argv", FLAX_COMMANDS.values(), ids=FLAX_COMMANDS)
def test_published_flax_commands_parse_on_both_backends(argv: list[str]) -> None:
    config = parse_command_line(argv, "flax")
    assert config.resolution == 512
    assert config.learning_rate == 1e-5
    assert parse_command_line([*argv, "--output_dir=run"], "torch").image_column == "image"


@pytest.mark.parametrize("argv", XL_COMMANDS.values(), ids=XL_COMMANDS)
def test_published_commands_for_xl_mean_the_same_to_both_backends(argv: list[str]) -> None:
    config = parse_command_line(argv, "flax")
    assert config == parse_command_line(argv, "torch")
    assert config.pretrained_model_name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"
    assert config.mixed_precision == "fp16"


@pytest.mark.parametrize("flag", ["--distributed", "--enable_mindspore_data_sink"])
@pytest.mark.parametrize("backend", ["flax", "torch"])
def test_flags_of_mindones_script_alone_are_refused_by_name(
    flag: str, backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its guide's command has none of them."""
    with pytest.raises(SystemExit):
        parse_command_line([*XL_COMMANDS["SDXL, MindONE"], flag], backend)
    assert f"unknown flag {flag};" in capsys.readouterr().err


def test_values_of_a_published_command_arrive() -> None:
    config = parse_command_line(TORCH_COMMANDS["8 GB"], "torch")
    assert config.validation_image == ("./conditioning_image_1.png", "./conditioning_image_2.png")
    assert config.validation_prompt == (
        "red circle with blue background",
        "cyan circle with brown floral background",
    )
    assert config.output_dir == "path to save model"
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (1, 4)
    assert (config.gradient_checkpointing, config.set_grads_to_none, config.push_to_hub) == (True, True, False)
    assert config.mixed_precision == "fp16"


def test_the_doubled_equals_sign_of_the_published_guide_means_one() -> None:
    (assignment,) = read_arguments(["--profile_steps==5"], FLAGS)
    assert value_of(assignment, FLAGS["profile_steps"]) == 5
