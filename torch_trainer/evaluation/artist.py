"""Pictures of a trained ControlNet, on one device."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from shared.checkpoints.trained_params import read_trained_params
from shared.generate.controlnets import NamedControlNet
from shared.generate.pictures import Artist, does_not_fit
from shared.generate.preparation import Commission
from shared.models.configs import ControlNetConfig
from shared.models.source import controlnet_source
from shared.models.trained_parts import is_decoder, with_unet_prefix
from shared.user_errors import UserError
from torch_trainer.base_models import BaseModels, load_base_models, load_model
from torch_trainer.distributed.accelerator import COMPUTE_DTYPES, device_name, make_accelerator
from torch_trainer.evaluation.image_sampler import ImageSampler
from torch_trainer.training.attention import choose_attention


def make_artist(job: Commission) -> Artist:
    """Load the models onto the device that accelerate chooses.

    Raises:
        UserError: weights are missing or damaged, or do not fit their configuration; the device's memory is too small;
            or several processes were launched, which would draw the same.
    """
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
    named = job.models
    accelerator = make_accelerator(named.config)
    if accelerator.num_processes > 1:
        raise UserError(
            f"{accelerator.num_processes} processes were launched, and one draws all pictures: start it with python3."
        )
    dtype, device = COMPUTE_DTYPES[accelerator.mixed_precision], accelerator.device
    models = load_base_models(named.config, dtype, unet_source=named.unet)
    first, *more = named.controlnets
    if first.checkpoint is not None:
        _take_parameters_of(first.checkpoint, models)
    models.more_controlnets = tuple(map(_load, more, named.architectures[1:]))
    steered = (models.controlnet, *models.more_controlnets, models.unet)
    for model in steered:
        model.requires_grad_(False).eval().to(dtype)
    parts = (*steered, models.vae, models.text_encoder, models.text_encoder_2)
    with _memory_in_words(job):
        for model in filter(None, parts):
            model.to(device)
    choose_attention(named.config, list(steered), device)
    at_once = min(job.config.batch_size, len(job.requests))
    sampler = ImageSampler(models, job.drawing, named.prompt_inputs, device, images_at_once=at_once)

    @torch.no_grad()
    def draw(prompts: list[str], conditions_RHWC: np.ndarray, indices: list[int]) -> np.ndarray:
        with _memory_in_words(job):
            return sampler(prompts, conditions_RHWC, indices).cpu().numpy()

    return Artist(backend="torch", devices=f"1 × {device_name(device)}", draw=draw, at_once=at_once)


@contextmanager
def _memory_in_words(job: Commission) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise does_not_fit(job) from error


def _take_parameters_of(checkpoint: Path, models: BaseModels) -> None:
    decoder = {name: param for name, param in models.unet.named_parameters() if models.sd_unlocked and is_decoder(name)}
    _read_into(dict(models.controlnet.named_parameters()) | with_unet_prefix(decoder), checkpoint)


def _load(controlnet: NamedControlNet, architecture: ControlNetConfig) -> Any:
    """One that draws with the first."""
    if controlnet.checkpoint is None:
        source = controlnet_source(controlnet.config)
        assert source is not None
        return load_model(ControlNetModel, ControlNetConfig, source)[0]
    model = ControlNetModel(**architecture.to_dict())
    _read_into(dict(model.named_parameters()), controlnet.checkpoint)
    return model


def _read_into(parts: Mapping[str, torch.nn.Parameter], checkpoint: Path) -> None:
    trained = read_trained_params(checkpoint, {name: tuple(param.shape) for name, param in parts.items()})
    with torch.no_grad():
        for name, param in parts.items():
            param.copy_(torch.from_numpy(trained[name]))
