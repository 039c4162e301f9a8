"""What sets Stable Diffusion XL apart, told from its configurations (Podell et al. 2023, arXiv:2307.01952)."""

from typing import Any

Sizes = tuple[int, int, int, int, int, int]
"""Original height and width, top and left edge of the crop, target height and width, in pixels: SDXL's `time_ids`."""

SIZES = 6


def is_xl(unet: Any) -> bool:
    """Whether a UNet's (or a ControlNet's) configuration is that of Stable Diffusion XL."""
    return unet.addition_embed_type == "text_time"


def sizes_of_crop(resolution: int, top: int = 0, left: int = 0) -> Sizes:
    """What SDXL is told of a square image, as diffusers' `train_controlnet_sdxl.py` does it (`compute_time_ids`)."""
    return resolution, resolution, top, left, resolution, resolution


def sizes_of_image(height: int, width: int) -> Sizes:
    """What SDXL is told of an image that nothing was cut from, as its pipelines are (`original_size` not given)."""
    return height, width, 0, 0, height, width


def vae_in_float32(unet: Any, vae: Any) -> bool:
    """Whether the VAE has to compute in float32 whatever the mixed precision.

    SDXL's activations overflow float16 in its own VAE, whose images are then black; a VAE that was mended says so with
    `force_upcast: false`. Other models' files leave the field out, where its default says nothing about them.
    """
    return is_xl(unet) and bool(vae.force_upcast)
