"""The `config.json` of every model, typed and within bounds, before either backend builds what it describes."""

from shared.model_files.configs.clip import CLIPTextConfig
from shared.model_files.configs.reading import Architecture, read_config
from shared.model_files.configs.unet import ControlNetConfig, UNet2DConditionConfig
from shared.model_files.configs.vae import AutoencoderKLConfig

__all__ = [
    "Architecture",
    "AutoencoderKLConfig",
    "CLIPTextConfig",
    "ControlNetConfig",
    "UNet2DConditionConfig",
    "read_config",
]
