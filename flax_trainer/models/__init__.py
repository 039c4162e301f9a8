"""Stable Diffusion's models in Flax NNX, with PyTorch's parameter names, reading and writing diffusers' folders."""

from flax_trainer.models.clip import CLIPTextConfig, FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection
from flax_trainer.models.controlnet import FlaxControlNetModel
from flax_trainer.models.unet import FlaxUNet2DConditionModel
from flax_trainer.models.vae import AutoencoderKLConfig, FlaxAutoencoderKL
from shared.models.configs.unet import ControlNetConfig, UNet2DConditionConfig

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
