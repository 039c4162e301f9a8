"""From flags to everything that drawing needs of small files, checked before a model is loaded."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import Backend, TrainConfig
from shared.config.support import notices
from shared.data.tokenization import PromptInputs, used_text
from shared.diffusion.control import Control
from shared.diffusion.drawing import Drawing
from shared.diffusion.samplers import sampler_plan
from shared.diffusion.schedule import NoiseSchedule
from shared.generate.options import GENERATE_FLAGS, GenerateConfig
from shared.generate.output_folder import check_output_folder
from shared.generate.requests import Request, condition_files, pair, prompts_of, read_condition
from shared.generate.trained_run import OF_BASE_MODEL, TrainedRun, run_of, trained_unet
from shared.models.base_model import check_base_model
from shared.models.compatibility import check_models_fit
from shared.models.configs import (
    AutoencoderKLConfig,
    CLIPTextConfig,
    ControlNetConfig,
    UNet2DConditionConfig,
    read_config,
)
from shared.models.source import ModelSource, base_source, controlnet_source, vae_source
from shared.models.trained_parts import UNET_FOLDER
from shared.models.xl import is_xl
from shared.run.setup import prompt_inputs_of
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_USUAL_SIDE = 512  # of models whose configuration does not say


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be drawn and with what; nothing of it is on a device.

    Attributes:
        models: names the models, as a training's configuration does.
        unet: in place of the base model's, where a run trained its decoder; None otherwise.
        checkpoint: of a run, whose parameters take the place of those that `models` names; None otherwise.
        conditions_NHWC: uint8, the condition images at the size of the pictures.
        headings: of each request, the part of its prompt that its tokens hold.
    """

    config: GenerateConfig
    models: TrainConfig
    unet: ModelSource | None
    checkpoint: Path | None
    schedule: NoiseSchedule
    drawing: Drawing
    prompt_inputs: PromptInputs
    requests: list[Request]
    condition_files: list[Path]
    conditions_NHWC: np.ndarray
    headings: list[str]


def prepare_job(config: GenerateConfig, backend: Backend) -> Job:
    """Check and open everything that can be wrong before a device is touched or a model loaded.

    Raises:
        UserError: a mistake in the flags, the models' small files, the conditions or the prompts.
    """
    for notice in notices(config, backend, GENERATE_FLAGS):
        logger.info(notice)
    files, prompts = condition_files(config), prompts_of(config)
    requests = pair(prompts, len(files), config.num_images_per_prompt)
    check_output_folder(Path(config.output_dir))
    controlnet = str(config.controlnet_model_name_or_path)
    run = run_of(controlnet)
    models = _models(config, run)
    schedule = NoiseSchedule.from_source(base_source(models, "scheduler"))
    unet = check_base_model(models, schedule.config)
    vae, controlnet_config = _fitting_configs(models, unet)
    height, width = _size(config, run, unet, vae)
    drawing = Drawing(
        sampler_plan(config.scheduler, schedule, config.num_inference_steps),
        height,
        width,
        config.seed,
        config.guidance_scale,
        Control.of(
            config.controlnet_conditioning_scale,
            config.control_guidance_start,
            config.control_guidance_end,
            guess_mode=config.guess_mode,
            pools_globally=controlnet_config.global_pool_conditions,
        ),
        config.negative_prompt,
    )
    interpolation = (TrainConfig() if run is None else run.config).image_interpolation_mode
    conditions_NHWC = np.stack([read_condition(path, height, width, interpolation) for path in files])
    prompt_inputs = prompt_inputs_of(models, is_xl=is_xl(unet))
    trained = trained_unet(controlnet)
    return Job(
        config=config,
        models=models,
        unet=None if trained is None else ModelSource(trained, UNET_FOLDER),
        checkpoint=None if run is None else run.checkpoint,
        schedule=schedule,
        drawing=drawing,
        prompt_inputs=prompt_inputs,
        requests=requests,
        condition_files=files,
        conditions_NHWC=conditions_NHWC,
        headings=_headings(requests, prompt_inputs),
    )


def _models(config: GenerateConfig, run: TrainedRun | None) -> TrainConfig:
    """The models by the names that a training's configuration has for them."""
    named = {name: getattr(config, name) for name in OF_BASE_MODEL}
    if named["pretrained_model_name_or_path"] is None:
        if run is None:
            raise UserError(
                "--pretrained_model_name_or_path is missing, and --controlnet_model_name_or_path "
                f"{shown(config.controlnet_model_name_or_path)} is not the folder of a run, whose config.yaml would "
                "name it: give the base model that the ControlNet was made for."
            )
        named = run.base_model() | {name: value for name, value in named.items() if value is not None}
    names = ("controlnet_model_name_or_path", "controlnet_revision")
    controlnet: dict[str, Any] = {name: getattr(config, name) for name in names}
    if run is not None and run.checkpoint is not None:
        controlnet = run.beginning()
    return TrainConfig(
        **named,
        **controlnet,
        cache_dir=config.cache_dir,
        seed=config.seed,
        mixed_precision=config.mixed_precision,
        enable_xformers_memory_efficient_attention=config.enable_xformers_memory_efficient_attention,
        allow_tf32=config.allow_tf32,
        ccache=config.ccache,
    )


def _fitting_configs(models: TrainConfig, unet: UNet2DConditionConfig) -> tuple[AutoencoderKLConfig, ControlNetConfig]:
    """Those of the VAE and the ControlNet.

    Raises:
        UserError: one is missing, or the models do not belong together.
    """
    source = controlnet_source(models)
    controlnet = (
        ControlNetConfig.from_unet_config(unet) if source is None else read_config(source.file(), ControlNetConfig)
    )
    vae = read_config(vae_source(models).file(), AutoencoderKLConfig)
    texts = [
        read_config(base_source(models, name).file(), CLIPTextConfig)
        for name in ("text_encoder", *(["text_encoder_2"] if is_xl(unet) else []))
    ]
    check_models_fit(str(models.pretrained_model_name_or_path), unet, texts[0], vae, controlnet, *texts[1:])
    return vae, controlnet


def _size(
    config: GenerateConfig, run: TrainedRun | None, unet: UNet2DConditionConfig, vae: AutoencoderKLConfig
) -> tuple[int, int]:
    """(height, width) of the pictures, of which the VAE can make latents."""
    factor = vae.scale_factor
    side = config.resolution or (None if run is None else run.config.resolution)
    usual_height, usual_width = (side, side) if side is not None else _usual_size(unet, factor)
    size = {"height": config.height or usual_height, "width": config.width or usual_width}
    for name, value in size.items():
        if value % factor:
            flag = name if config.height is not None else "resolution"
            below = value // factor * factor
            raise UserError(
                f"--{flag} is {value}, but the base model's VAE works on multiples of {factor} pixels. Use "
                f"{below + factor}{f' or {below}' if below else ''}."
            )
    return size["height"], size["width"]


def _usual_size(unet: UNet2DConditionConfig, factor: int) -> tuple[int, int]:
    """(height, width) of the pictures that the base model was trained on last, as diffusers' pipelines take it."""
    latents = unet.sample_size
    if latents is None:
        return _USUAL_SIDE, _USUAL_SIDE
    sides = latents if isinstance(latents, tuple) else (latents,)
    return sides[0] * factor, sides[-1] * factor


def _headings(requests: list[Request], prompt_inputs: PromptInputs) -> list[str]:
    """Says in the log where a prompt is too long for the text encoder."""
    used = {prompt: used_text(prompt_inputs.tokenize, prompt) for prompt in {request.prompt for request in requests}}
    for prompt, heading in used.items():
        if prompt != heading:
            logger.warning("--prompt: of %r only this is used: %r", shown(prompt), shown(heading))
    return [used[request.prompt] for request in requests]
