"""The flags of `python3 -m flax_trainer.generate` and `python3 -m torch_trainer.generate`, declared once."""

import dataclasses
from functools import partial
from typing import Literal

from shared.config.flags import FROM_ZERO, Equivalent, Flag, Rule, at_least, at_most, flag, flags_of, within
from shared.config.options import CHANNELS_OF_A_PICTURE, as_in_training

_model = partial(flag, "model")
_pictures = partial(flag, "pictures")
_sampling = partial(flag, "sampling")
_performance = partial(flag, "performance")

_FROM_START_TO_END = Rule(lambda part: 0 <= part <= 1, "in the range from 0 (the first step) to 1 (the last)")
LARGEST_SIDE = 8192  # pixels, as in training
_SIDE = (at_least(8), at_most(LARGEST_SIDE))


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Everything that is asked of pictures. Attribute names are flag names; lists are tuples."""

    controlnet_model_name_or_path: str | None = _model(
        None,
        "The ControlNet: the folder of a training run or a checkpoint in it, a folder in diffusers layout, or a Hub "
        "repository.",
    )
    controlnet_revision: str | None = as_in_training("controlnet_revision")
    pretrained_model_name_or_path: str | None = _model(
        None,
        "The base Stable Diffusion model: a folder in diffusers layout or a Hub repository. Without it, the one that "
        "the ControlNet's run was trained on, as its config.yaml says.",
    )
    pretrained_vae_model_name_or_path: str | None = as_in_training("pretrained_vae_model_name_or_path")
    tokenizer_name: str | None = as_in_training("tokenizer_name")
    revision: str | None = as_in_training("revision")
    variant: str | None = as_in_training("variant")
    cache_dir: str | None = as_in_training("cache_dir")

    conditioning_image: tuple[str, ...] | None = _pictures(
        None,
        "The condition images: files, or folders, whose pictures are taken in the order of their names. As many as "
        "there are prompts, or one for all. A ControlNet of several conditions takes one of each in turn: depth_1.png "
        "canny_1.png depth_2.png canny_2.png, or the folders depth/ canny/.",
    )
    conditioning_channels: tuple[int, ...] | None = _pictures(
        None,
        "The channels of each condition image that the ControlNet takes: 3 for colours, 1 for grey. Without it, those "
        "of the run's training; of a ControlNet that is no run's, a single image has all of them.",
        must_be=[CHANNELS_OF_A_PICTURE],
    )
    prompt: tuple[str, ...] | None = _pictures(
        None, "The prompts: as many as there are condition images, or one for all.", is_prompt=True
    )
    prompt_file: str | None = _pictures(None, "A text file with a prompt on each line, in place of --prompt.")
    negative_prompt: str | None = _pictures(
        None, "What the pictures are guided away from, in place of the empty prompt.", is_prompt=True
    )
    num_images_per_prompt: int = _pictures(
        1, "The number of pictures for each pair of prompt and condition.", must_be=[at_least(1), at_most(1000)]
    )
    resolution: int | None = _pictures(
        None,
        "The side of square pictures, in pixels: conditions are resized to it, then cropped at the centre. Without it "
        "and --height and --width, that of the run's training, or else the base model's own.",
        must_be=_SIDE,
    )
    height: int | None = _pictures(None, "The pictures' height in pixels, with --width.", must_be=_SIDE)
    width: int | None = _pictures(None, "The pictures' width in pixels, with --height.", must_be=_SIDE)
    output_dir: str = _pictures(
        "generated",
        "The folder for the pictures: a new or an empty one, or that of an earlier generation, whose pictures are then "
        "replaced.",
    )

    seed: int = _sampling(
        0,
        "With a picture's number it decides the noise that the picture starts from, on either backend.",
        must_be=[within(0, 2**63 - 1)],
    )
    scheduler: Literal["unipc", "ddim", "euler", "dpmsolver++"] = _sampling(
        "unipc", "How noise becomes a picture; timesteps are spaced as the base model's scheduler_config.json says."
    )
    num_inference_steps: int = _sampling(20, "The number of steps of --scheduler.", must_be=[at_least(1)])
    guidance_scale: float = _sampling(
        7.5, "The strength of classifier-free guidance, where 1 or less means none.", must_be=[FROM_ZERO]
    )
    controlnet_conditioning_scale: float = _sampling(
        1.0, "How strongly the ControlNet steers: what it adds to the UNet is multiplied by this.", must_be=[FROM_ZERO]
    )
    control_guidance_start: float = _sampling(
        0.0, "The part of all steps after which the ControlNet begins to steer.", must_be=[_FROM_START_TO_END]
    )
    control_guidance_end: float = _sampling(
        1.0, "The part of all steps after which the ControlNet steers no more.", must_be=[_FROM_START_TO_END]
    )
    guess_mode: bool = _sampling(
        False,
        "Guide away from what is drawn without prompt and without control, and let details of the condition count "
        "less: for pictures without a prompt.",
    )

    batch_size: int = _performance(
        1, "The number of pictures that a device draws at once.", must_be=[at_least(1), at_most(2**16)]
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = _performance("no", "The number format of the models.")
    enable_xformers_memory_efficient_attention: bool | None = as_in_training(
        "enable_xformers_memory_efficient_attention"
    )
    allow_tf32: bool = as_in_training("allow_tf32")
    ccache: str | None = _performance(
        None,
        "The folder that keeps compiled programs for the next time, or none to keep nothing, as in training.",
        torch=Equivalent("PyTorch compiles nothing here, and the value is ignored"),
    )

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1


GENERATE_FLAGS: dict[str, Flag] = flags_of(GenerateConfig)
