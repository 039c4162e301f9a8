"""The flags of `python3 -m flax_trainer.generate` and `python3 -m torch_trainer.generate`, declared once."""

import dataclasses
from functools import partial
from typing import Any, Literal

from shared.config.flags import FROM_ZERO, Equivalent, Flag, Rule, at_least, at_most, flag, flags_of, within
from shared.config.options import CHANNELS_OF_A_PICTURE, as_in_training
from shared.prepare_data.options import ComputedCondition

_model = partial(flag, "model")
_pictures = partial(flag, "pictures")
_sampling = partial(flag, "sampling")
_performance = partial(flag, "performance")

_FROM_START_TO_END = Rule(lambda part: 0 <= part <= 1, "in the range from 0 (the first step) to 1 (the last)")
LARGEST_SIDE = 8192  # pixels, as in training
Annotation = Literal["none", ComputedCondition]
OF_EACH_CONTROLNET = (
    "controlnet_revision",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
)
"""Flags with a value for each ControlNet, or one for all."""
_SIDE = (at_least(8), at_most(LARGEST_SIDE))


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Everything that is asked of pictures. Attribute names are flag names; lists are tuples."""

    controlnet_model_name_or_path: tuple[str, ...] | None = _model(
        None,
        "The ControlNet: the folder of a training run or a checkpoint in it, a folder in diffusers layout, or a Hub "
        "repository. Several of one base model steer together, each by its own condition.",
    )
    controlnet_revision: tuple[str, ...] | None = _model(
        None, "The branch, tag or commit of ControlNets on the Hub: of each, or one for all."
    )
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
        "there are prompts, or one for all. ControlNets of several conditions, and several ControlNets, take one of "
        "each in turn: depth_1.png canny_1.png depth_2.png canny_2.png, or the folders depth/ canny/.",
    )
    conditioning_channels: tuple[int, ...] | None = _pictures(
        None,
        "The channels of each condition image that the ControlNets take: 3 for colours, 1 for grey. Without it, those "
        "of the run's training; of a ControlNet that is no run's, a single image has all of them.",
        must_be=[CHANNELS_OF_A_PICTURE],
    )
    annotate: tuple[Annotation, ...] | None = _pictures(
        None,
        "What to make of a photograph to get the condition, as shared.prepare_data's annotate does for training; none "
        "where the image is the condition. One for each condition image of a picture, or one for all.",
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
    controlnet_conditioning_scale: tuple[float, ...] = _sampling(
        (1.0,),
        "How strongly each ControlNet steers, or all: what it adds to the UNet is multiplied by this.",
        must_be=[FROM_ZERO],
    )
    control_guidance_start: tuple[float, ...] = _sampling(
        (0.0,),
        "The part of all steps after which each ControlNet, or all, begin to steer.",
        must_be=[_FROM_START_TO_END],
    )
    control_guidance_end: tuple[float, ...] = _sampling(
        (1.0,),
        "The part of all steps after which each ControlNet, or all, steer no more.",
        must_be=[_FROM_START_TO_END],
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

    def of_each_controlnet(self, name: str) -> tuple[Any, ...]:
        """The values of a flag of which one stands for all ControlNets; None for each where it is not given."""
        values: tuple[Any, ...] = getattr(self, name) or (None,)
        return values * len(self.controlnet_model_name_or_path or ()) if len(values) == 1 else values


GENERATE_FLAGS: dict[str, Flag] = flags_of(GenerateConfig)
_FIELDS = {field.name: field for field in dataclasses.fields(GenerateConfig)}


def as_in_generation(name: str) -> Any:
    """Declares a field of another program's configuration as the flag of that name here."""
    field = _FIELDS[name]
    return dataclasses.field(default=field.default, repr=field.repr, metadata=field.metadata)
