"""From flags to everything that drawing needs, checked before a model is loaded."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.config import Backend
from shared.config.support import notices
from shared.data.tokenization import Tokenize, used_text
from shared.diffusion.control import Control, Strength
from shared.diffusion.drawing import Drawing
from shared.diffusion.samplers import sampler_plan
from shared.generate.conditions import condition_files, grouped, read_conditions
from shared.generate.models import NamedModels, find_models
from shared.generate.options import GENERATE_FLAGS, LARGEST_SIDE, GenerateConfig
from shared.generate.output_folder import check_output_folder
from shared.generate.requests import Request, pair, prompts_of
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Commission:
    """What a backend has to know before it draws; nothing of it is on a device."""

    config: GenerateConfig
    models: NamedModels
    drawing: Drawing
    requests: list[Request]


@dataclass(frozen=True, eq=False)
class Job(Commission):
    """What is to be drawn and with what.

    Attributes:
        condition_files: of each group of conditions, one of each.
        conditions_GHWN: uint8, the condition images of each group, side by side, at the size of the pictures.
        headings: of each request, the part of its prompt that its tokens hold.
    """

    condition_files: list[tuple[Path, ...]]
    conditions_GHWN: np.ndarray
    headings: list[str]


def prepare_job(config: GenerateConfig, backend: Backend) -> Job:
    """Check and open everything that can be wrong before a device is touched or a model loaded.

    Raises:
        UserError: a mistake in the flags, the models' small files, the conditions or the prompts.
    """
    for notice in notices(config, backend, GENERATE_FLAGS):
        logger.info(notice)
    files, prompts = condition_files(config), prompts_of(config)
    check_output_folder(Path(config.output_dir))
    models = find_models(config)
    groups = grouped(files, len(models.conditions))
    requests = pair(prompts, len(groups), config.num_images_per_prompt)
    drawing = drawing_of(config, models)
    conditions = [read_conditions(group, models.conditions, drawing.height, drawing.width) for group in groups]
    return Job(
        config=config,
        models=models,
        drawing=drawing,
        requests=requests,
        condition_files=groups,
        conditions_GHWN=np.stack(conditions),
        headings=_headings(requests, models.prompt_inputs.tokenize),
    )


def drawing_of(config: GenerateConfig, models: NamedModels) -> Drawing:
    """How these models draw what the flags say.

    Raises:
        UserError: the VAE cannot take the size, or the scheduler has no such plan.
    """
    height, width = _size(config, models)
    of_each = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    control = Control.of(
        [Strength(*values) for values in zip(*map(config.of_each_controlnet, of_each), strict=True)],
        guess_mode=config.guess_mode,
        pools_globally=[each.global_pool_conditions for each in models.architectures],
    )
    plan = sampler_plan(config.scheduler, models.schedule, config.num_inference_steps)
    return Drawing(plan, height, width, config.seed, config.guidance_scale, control, config.negative_prompt)


def _size(config: GenerateConfig, models: NamedModels) -> tuple[int, int]:
    """(height, width) of the pictures, of which the VAE can make latents."""
    factor, usual = models.vae_config.scale_factor, models.usual_size
    height, width = (config.resolution, config.resolution) if config.resolution is not None else usual
    size = {"height": config.height or height, "width": config.width or width}
    if max(size.values()) > LARGEST_SIDE:
        raise UserError(
            f"The base model's configuration asks for pictures of {size['width']}x{size['height']} pixels, more than "
            f"{LARGEST_SIDE} on a side: give --resolution."
        )
    for name, value in size.items():
        if value % factor:
            flag = name if config.height is not None else "resolution"
            below = value // factor * factor
            raise UserError(
                f"--{flag} is {value}, but the base model's VAE works on multiples of {factor} pixels. Use "
                f"{below + factor}{f' or {below}' if below else ''}."
            )
    return size["height"], size["width"]


def _headings(requests: list[Request], tokenize: Tokenize) -> list[str]:
    """Says in the log where a prompt is too long for the text encoder."""
    used = {prompt: used_text(tokenize, prompt) for prompt in {request.prompt for request in requests}}
    for prompt, heading in used.items():
        if prompt != heading:
            logger.warning("--prompt: of %r only this is used: %r", shown(prompt), shown(heading))
    return [used[request.prompt] for request in requests]
