"""The `config.json` of every model, typed and within bounds, before either backend builds what it describes."""

from shared.models.configs.clip import CLIPTextConfig
from shared.models.configs.reading import Architecture, read_config
from shared.models.configs.unet import ControlNetConfig, UNet2DConditionConfig
from shared.models.configs.vae import AutoencoderKLConfig

__all__ = [
    "Architecture",
    "AutoencoderKLConfig",
    "CLIPTextConfig",
    "ControlNetConfig",
    "UNet2DConditionConfig",
    "read_config",
]
