"""The VAE's encoder and the text encoders at work before a training, to make a cache.

Axes: B images at once, R resolution, H W C of the latents.
"""

import dataclasses
from functools import partial
from typing import Any

import numpy.typing as npt
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from shared.config import TrainConfig
from shared.models.configs import AutoencoderKLConfig, UNet2DConditionConfig, read_config
from shared.models.source import base_source, vae_source
from shared.models.xl import is_xl, vae_in_float32
from shared.prepare_data.cache.encoders import EncodedImages, Encoders, ImageEncoder
from shared.run.setup import check_resolution
from torch_trainer.base_models import BaseModels, load_model
from torch_trainer.distributed.accelerator import COMPUTE_DTYPES, make_accelerator
from torch_trainer.text_encoding import as_stored, open_text_encoder
from torch_trainer.training.step import encode_images


def open_encoders(config: TrainConfig) -> Encoders:
    """Those of the base model, on this process's device.

    Raises:
        UserError: a part of it is missing or not supported.
    """
    accelerator = make_accelerator(config)
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    config = dataclasses.replace(config, mixed_precision=accelerator.mixed_precision)
    unet = read_config(base_source(config, "unet").file(), UNet2DConditionConfig)
    vae = read_config(vae_source(config).file(), AutoencoderKLConfig)
    check_resolution(config, vae.scale_factor)
    side = config.resolution // vae.scale_factor
    return Encoders(
        config=config,
        latent_shape=(side, side, vae.latent_channels),
        open_image_encoder=partial(_open_image_encoder, config, accelerator, unet),
        open_text_encoder=partial(open_text_encoder, config, accelerator, is_xl=is_xl(unet)),
    )


def _open_image_encoder(config: TrainConfig, accelerator: Accelerator, unet: UNet2DConditionConfig) -> ImageEncoder:
    """`--train_batch_size` images at once: what fits a training fits here."""
    dtype = COMPUTE_DTYPES[accelerator.mixed_precision]
    vae, vae_config = load_model(AutoencoderKL, AutoencoderKLConfig, vae_source(config))
    vae.requires_grad_(False).to(accelerator.device, torch.float32 if vae_in_float32(unet, vae_config) else dtype)
    models = BaseModels(controlnet=None, unet=None, vae=vae, text_encoder=None, dtype=dtype, sd_unlocked=False)

    @torch.no_grad()
    def encode(pixels_BRR3: npt.NDArray[Any]) -> EncodedImages:
        pixels_B3RR = torch.from_numpy(pixels_BRR3).to(accelerator.device).permute(0, 3, 1, 2)
        mean_BCHW, std_BCHW = encode_images(models, pixels_B3RR)
        return _stored(mean_BCHW, dtype), _stored(std_BCHW, dtype)

    return ImageEncoder(config.train_batch_size, encode)


def _stored(latents_BCHW: torch.Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    return as_stored(latents_BCHW.to(dtype).permute(0, 2, 3, 1).cpu())
