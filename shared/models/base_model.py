"""What kind of base model a run has, and whether it is one to train on, told from its small files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.config import TrainConfig
from shared.models.compatibility import check_models_fit
from shared.models.configs import (
    AutoencoderKLConfig,
    CLIPTextConfig,
    ControlNetConfig,
    UNet2DConditionConfig,
    read_config,
)
from shared.models.source import (
    CONFIG_FILE,
    base_source,
    controlnet_source,
    shown_name,
    vae_source,
    xl_tokenizer_sources,
)
from shared.models.xl import SIZES, is_xl
from shared.untrusted import MIB, read_json
from shared.user_errors import UserError

_INDEX = "model_index.json"
_TOKENIZER_FILE = "tokenizer_config.json"
_SECOND_TEXT_ENCODER = {"text_encoder_2": CONFIG_FILE}
_SECOND = _SECOND_TEXT_ENCODER | {"tokenizer_2": _TOKENIZER_FILE}
_INPAINTING_CHANNELS = 9  # latents, a mask, latents of what it leaves
_OF_CONSISTENCY_MODELS = ("LCMScheduler", "TCDScheduler")
_OF_ADVERSARIAL_MODELS = ("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler")  # SDXL-Turbo; SDXL-Lightning
_ADVICE = "Use stabilityai/stable-diffusion-xl-base-1.0, or a model that was made from it."


@dataclass(frozen=True)
class _Index:
    """What is read of a `model_index.json`."""

    force_zeros_for_empty_prompt: bool = True


def check_base_model(config: TrainConfig, scheduler: Mapping[str, Any]) -> UNet2DConditionConfig:
    """The base model's UNet, if a ControlNet can be trained on it; only configurations are read.

    Args:
        scheduler: the fields of the base model's `scheduler_config.json`.

    Raises:
        UserError: it is another kind of model, lacks a part, or does not go with a flag.
    """
    unet = read_config(base_source(config, "unet").file(), UNet2DConditionConfig)
    if unet.in_channels == _INPAINTING_CHANNELS and unet.out_channels < _INPAINTING_CHANNELS:
        raise UserError(
            f"{_given(config)} is an inpainting model, whose UNet takes a mask and a masked picture too (in_channels "
            f"is {unet.in_channels}): expected a text-to-image model. Use the base model that it was made from."
        )
    if is_xl(unet):
        _check_xl(config, unet, scheduler)
    else:
        _check_no_sizes(config)
    controlnet = _controlnet_of_its_kind(config, unet)
    check_models_fit(
        str(config.pretrained_model_name_or_path),
        unet,
        read_config(base_source(config, "text_encoder").file(), CLIPTextConfig),
        read_config(vae_source(config).file(), AutoencoderKLConfig),
        controlnet,
        read_config(base_source(config, "text_encoder_2").file(), CLIPTextConfig) if is_xl(unet) else None,
        config.control_channels,
    )
    return unet


def zeros_for_empty_prompt(config: TrainConfig) -> bool:
    """Whether Stable Diffusion XL's pipeline takes zeros where no negative prompt is given: its own default is yes.

    Raises:
        UserError: `model_index.json` cannot be read.
    """
    index = base_source(config, "").optional_file(_INDEX)
    if index is None:
        return True
    return read_json(index, _Index, fix="Download or copy it again.", limit=MIB).force_zeros_for_empty_prompt


def _check_xl(config: TrainConfig, unet: UNet2DConditionConfig, scheduler: Mapping[str, Any]) -> None:
    needed = _SECOND if config.tokenizer_name is None else _SECOND_TEXT_ENCODER
    for folder, file in needed.items():
        if base_source(config, folder).optional_file(file) is None:
            raise UserError(
                f"{_given(config)} is a Stable Diffusion XL model without {folder}/{file}: expected two text encoders "
                "and two tokenizers. Download or copy the whole model."
            )
    text_encoder_2 = read_config(base_source(config, "text_encoder_2").file(), CLIPTextConfig)
    assert unet.projection_class_embeddings_input_dim is not None
    assert unet.addition_time_embed_dim is not None
    numbers = unet.projection_class_embeddings_input_dim - text_encoder_2.projection_dim
    if numbers == (SIZES - 1) * unet.addition_time_embed_dim:
        raise UserError(
            f"{_given(config)} is the refiner of Stable Diffusion XL, which is told a score in place of a size and "
            f"goes on from what the base model draws: expected the base model. {_ADVICE}"
        )
    sign = _sign_of_distillation(scheduler)
    if sign is not None:
        raise UserError(
            f"{_given(config)} is a distilled model such as SDXL-Turbo, SDXL-Lightning or an LCM (its "
            f"scheduler_config.json has {sign}), which knows few timesteps: expected one that predicts noise at all of "
            f"them. {_ADVICE} If this one was not distilled, correct that file."
        )
    _check_two_tokenizers(config)


def _sign_of_distillation(scheduler: Mapping[str, Any]) -> str | None:
    """What of a scheduler only models have that were distilled to a few steps; None if nothing.

    Models of v_prediction are sampled with trailing timesteps, too (Lin et al. 2023, section 3.3).
    """
    name = scheduler.get("_class_name")
    if name in _OF_CONSISTENCY_MODELS:
        return f"_class_name '{name}'"
    is_trailing = scheduler.get("timestep_spacing") == "trailing"
    if name in _OF_ADVERSARIAL_MODELS and is_trailing and scheduler.get("prediction_type") != "v_prediction":
        return f"_class_name '{name}' and timestep_spacing 'trailing'"
    return None


def _check_two_tokenizers(config: TrainConfig) -> None:
    """diffusers' `train_controlnet_sdxl.py` knows `--tokenizer_name` and passes over it."""
    if config.tokenizer_name is None:
        return
    for source in xl_tokenizer_sources(config):
        if source.optional_file(_TOKENIZER_FILE) is None:
            raise UserError(
                f"--tokenizer_name {shown_name(config.tokenizer_name)} is without "
                f"{source.subfolder}/{_TOKENIZER_FILE}: expected, for Stable Diffusion XL, a folder or repository with "
                "two tokenizers in its subfolders tokenizer and tokenizer_2, as a base model has them. Give such a "
                "one, or leave it out for the base model's own."
            )


def _check_no_sizes(config: TrainConfig) -> None:
    for name in ("crops_coords_top_left_h", "crops_coords_top_left_w", "time_ids_from_data"):
        if getattr(config, name):
            raise UserError(
                f"--{name} is {getattr(config, name)}, but {shown_name(str(config.pretrained_model_name_or_path))} is "
                "not told of crops; only Stable Diffusion XL is. Leave it out."
            )


def _controlnet_of_its_kind(config: TrainConfig, unet: UNet2DConditionConfig) -> ControlNetConfig:
    """The one that training starts from."""
    source = controlnet_source(config)
    if source is None:
        return ControlNetConfig.from_unet_config(unet, conditioning_channels=config.control_channels)
    controlnet = read_config(source.file(), ControlNetConfig)
    if is_xl(controlnet) != is_xl(unet):
        raise UserError(
            f"--controlnet_model_name_or_path {source.name} is a ControlNet for {_kind(controlnet)}: expected one for "
            f"{_kind(unet)}, as {shown_name(str(config.pretrained_model_name_or_path))} is. Give such a one, or leave "
            "it out."
        )
    return controlnet


def _kind(model: UNet2DConditionConfig | ControlNetConfig) -> str:
    return "Stable Diffusion XL" if is_xl(model) else "Stable Diffusion 1.x or 2.x"


def _given(config: TrainConfig) -> str:
    return f"--pretrained_model_name_or_path {shown_name(str(config.pretrained_model_name_or_path))}"
