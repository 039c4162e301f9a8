"""Command lines written for diffusers' scripts: every flag exists, and the published examples parse."""

import pathlib

import pytest

from shared.config import parse_command_line
from shared.config.arguments import read_arguments, value_of
from shared.config.options import FLAGS

_LISTED = pathlib.Path(__file__).with_name("diffusers_flags.txt").read_text(encoding="utf-8").splitlines()
_DIFFUSERS_FLAGS = [tuple(line.split(" | ")) for line in _LISTED if not line.startswith("#")]

_PAIRS = [
    *("--validation_image", "./conditioning_image_1.png", "./conditioning_image_2.png"),
    *("--validation_prompt", "red circle with blue background", "cyan circle with brown floral background"),
]
_FILL50K = [
    *("--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5", "--output_dir=path to save model"),
    *("--dataset_name=fusing/fill50k", "--resolution=512", "--learning_rate=1e-5", *_PAIRS),
]
_SDXL = "--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0"
_ACCUMULATE = ["--train_batch_size=1", "--gradient_accumulation_steps=4"]
_LOW_MEMORY = ["--gradient_checkpointing", "--enable_xformers_memory_efficient_attention", "--set_grads_to_none"]

_TORCH_COMMANDS = {
    "first": [*_FILL50K, "--train_batch_size=4"],
    "accumulation": [*_FILL50K, *_ACCUMULATE],
    "to the hub": [*_FILL50K, *_ACCUMULATE, "--push_to_hub"],
    "many GPUs": [
        *_FILL50K,
        *("--train_batch_size=4", "--mixed_precision=fp16", "--tracker_project_name=controlnet-demo"),
        "--report_to=wandb",
    ],
    "16 GB": [*_FILL50K, *_ACCUMULATE, "--gradient_checkpointing", "--use_8bit_adam"],
    "12 GB": [*_FILL50K, *_ACCUMULATE, "--use_8bit_adam", *_LOW_MEMORY],
    "8 GB": [*_FILL50K, *_ACCUMULATE, *_LOW_MEMORY, "--mixed_precision", "fp16"],
    "SDXL": [
        *(_SDXL, "--output_dir=path to save model", "--dataset_name=fusing/fill50k", "--mixed_precision=fp16"),
        *("--resolution=1024", "--learning_rate=1e-5", "--max_train_steps=15000", *_PAIRS, "--validation_steps=100"),
        *(*_ACCUMULATE, "--report_to=wandb", "--seed=42", "--push_to_hub"),
    ],
}
_FLAX_COMMANDS = {
    "fill50k": [
        *(*_FILL50K, "--validation_steps=1000", "--train_batch_size=2", "--revision=non-ema", "--from_pt"),
        *("--report_to=wandb", "--tracker_project_name=controlnet-fill-circle", "--num_train_epochs=11"),
        *("--push_to_hub", "--hub_model_id=controlnet-fill-circle"),
    ],
    "streaming": [
        "--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5",
        *("--output_dir=runs/uncanny-faces-{timestamp}", "--dataset_name=multimodalart/facesyntheticsspigacaptioned"),
        *("--streaming", "--conditioning_image_column=spiga_seg", "--image_column=image"),
        *("--caption_column=image_caption", "--resolution=512", "--max_train_samples", "100000"),
        *("--learning_rate=1e-5", "--train_batch_size=1", "--revision=flax", "--report_to=wandb"),
        "--tracker_project_name=controlnet-uncanny-faces",
    ],
    "checkpoints": [*_FILL50K, "--checkpointing_steps=500", "--controlnet_model_name_or_path=./control_out/500"],
    "Min-SNR": [*_FILL50K, "--snr_gamma=5.0"],
}


@pytest.mark.parametrize(("name", "type_name", "scripts"), _DIFFUSERS_FLAGS)
def test_each_flag_of_diffusers_exists_with_its_type(name: str, type_name: str, scripts: str) -> None:
    assert FLAGS[name].type_name.removesuffix(" | None") == type_name, scripts


@pytest.mark.parametrize("argv", _TORCH_COMMANDS.values(), ids=_TORCH_COMMANDS)
def test_published_pytorch_commands_parse(argv: list[str]) -> None:
    assert parse_command_line(argv, "torch").dataset_name == "fusing/fill50k"


@pytest.mark.parametrize("argv", _FLAX_COMMANDS.values(), ids=_FLAX_COMMANDS)
def test_published_flax_commands_parse_on_both_backends(argv: list[str]) -> None:
    config = parse_command_line(argv, "flax")
    assert config.resolution == 512
    assert config.learning_rate == 1e-5
    assert parse_command_line([*argv, "--output_dir=run"], "torch").image_column == "image"


def test_values_of_a_published_command_arrive() -> None:
    config = parse_command_line(_TORCH_COMMANDS["8 GB"], "torch")
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
