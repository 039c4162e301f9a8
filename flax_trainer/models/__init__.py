"""Stable Diffusion's models in Flax NNX, with PyTorch's parameter names, reading and writing diffusers' folders."""

from flax_trainer.models.clip import CLIPTextConfig, FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection
from flax_trainer.models.controlnet import FlaxControlNetModel
from flax_trainer.models.unet import FlaxUNet2DConditionModel
from flax_trainer.models.unet_config import ControlNetConfig, UNet2DConditionConfig
from flax_trainer.models.vae import AutoencoderKLConfig, FlaxAutoencoderKL

__all__ = [
    "AutoencoderKLConfig",
    "CLIPTextConfig",
    "ControlNetConfig",
    "FlaxAutoencoderKL",
    "FlaxCLIPTextModel",
    "FlaxCLIPTextModelWithProjection",
    "FlaxControlNetModel",
    "FlaxUNet2DConditionModel",
    "UNet2DConditionConfig",
]
