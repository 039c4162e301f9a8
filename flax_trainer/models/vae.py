"""The autoencoder between pixels and latents.

Axes: B batch, S strips of an image (see `strips.py`), H height, W width, C channels, L positions of a feature map.

Reference: Rombach et al. 2022 (arXiv:2112.10752, section 3.1); diffusers' `AutoencoderKL`, whose names are kept.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from flax_trainer.models.kernels.attention import dot_product_attention
from flax_trainer.models.kernels.convolution import has_few_images
from flax_trainer.models.kernels.strips import STRIPS, from_strips, to_strips
from flax_trainer.models.layers.basic import Conv, GroupNorm, Linear
from flax_trainer.models.layers.compute import PLAINLY, Compute
from flax_trainer.models.layers.resnet import Downsample2D, Upsample2D
from flax_trainer.models.pretrained import PretrainedModel
from shared.models.configs import AutoencoderKLConfig

NORM_EPS = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class FlaxAutoencoderKL(PretrainedModel):
    """Encodes images to the statistics of their latents and decodes latents to images.

    Computes in the dtype of its parameters; normalisation, softmax and the latents' statistics are float32.
    """

    config_class = AutoencoderKLConfig
    identity: ClassVar[dict[str, Any]] = {"_class_name": "AutoencoderKL"}

    def __init__(self, config: AutoencoderKLConfig, compute: Compute = PLAINLY):
        super().__init__(config)
        self.encoder = Encoder(config, compute)
        self.decoder = Decoder(config, compute)
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.quant_conv = Conv(moments, moments, 1, compute) if config.use_quant_conv else None
        self.post_quant_conv = Conv(latents, latents, 1, compute) if config.use_post_quant_conv else None

    @property
    def scale_factor(self) -> int:
        """Pixels per latent position, along each side: 8 for Stable Diffusion."""
        return self.config.scale_factor

    def encode(self, pixels_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The normal distribution of an image's latents.

        Args:
            pixels_BHWC: floats in [-1, 1]. Sides that `scale_factor` does not divide are rounded down.

        Returns:
            mean and standard deviation, both float32 [B, H/scale_factor, W/scale_factor, latent_channels], not yet
            multiplied by `scaling_factor`; `mean + std * noise` samples it (diffusers' `DiagonalGaussianDistribution`).
        """
        moments_BHWC = self.encoder(pixels_BHWC.astype(self.encoder.conv_in.weight.dtype))
        if self.quant_conv is not None:
            moments_BHWC = self.quant_conv(moments_BHWC)
        mean_BHWC, log_variance_BHWC = jnp.split(moments_BHWC.astype(jnp.float32), 2, axis=-1)
        return mean_BHWC, jnp.exp(0.5 * jnp.clip(log_variance_BHWC, *LOG_VARIANCE_RANGE))

    def decode(self, latents_BHWC: jax.Array) -> jax.Array:
        """The image of latents that were already divided by `scaling_factor`.

        Returns:
            [B, H*scale_factor, W*scale_factor, out_channels] in the parameters' dtype, around [-1, 1] but not clipped.
        """
        latents_BHWC = latents_BHWC.astype(self.decoder.conv_in.weight.dtype)
        if self.post_quant_conv is not None:
            latents_BHWC = self.post_quant_conv(latents_BHWC)
        return self.decoder(latents_BHWC)


class Encoder(nnx.Module):
    """Pixels to the mean and log variance of latents, side by side in the channels."""

    def __init__(self, config: AutoencoderKLConfig, compute: Compute):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], 3, compute, padding=1)
        self.down_blocks = nnx.List(
            DownEncoderBlock2D(
                before, width, config.layers_per_block, groups, compute, downsample=index < len(widths) - 1
            )
            for index, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = MidBlock2D(widths[-1], groups, compute, add_attention=config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=NORM_EPS, compute=compute)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, compute, padding=1)

    def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
        in_strips = self._in_strips(pixels_BHWC)
        x = self.conv_in(to_strips(pixels_BHWC) if in_strips else pixels_BHWC)
        for block in self.down_blocks:
            x = block(x)
        x_BHWC = self.mid_block(from_strips(x) if in_strips else x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x_BHWC)))

    def _in_strips(self, pixels_BHWC: jax.Array) -> bool:
        """Whether a TPU gets few images, whose strips have whole columns at every resolution."""
        reduction = 2 ** (len(self.down_blocks) - 1)
        return self.conv_in.for_tpu and has_few_images(pixels_BHWC) and pixels_BHWC.shape[2] % (STRIPS * reduction) == 0


class Decoder(nnx.Module):
    """Latents to pixels."""

    def __init__(self, config: AutoencoderKLConfig, compute: Compute):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], 3, compute, padding=1)
        self.mid_block = MidBlock2D(widths[0], groups, compute, add_attention=config.mid_block_add_attention)
        self.up_blocks = nnx.List(
            UpDecoderBlock2D(
                before, width, config.layers_per_block + 1, groups, compute, upsample=index < len(widths) - 1
            )
            for index, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=NORM_EPS, compute=compute)
        self.conv_out = Conv(widths[-1], config.out_channels, 3, compute, padding=1)

    def __call__(self, latents_BHWC: jax.Array) -> jax.Array:
        x_BHWC = self.mid_block(self.conv_in(latents_BHWC))
        for block in self.up_blocks:
            x_BHWC = block(x_BHWC)
        return self.conv_out(nnx.silu(self.conv_norm_out(x_BHWC)))


class DownEncoderBlock2D(nnx.Module):
    """Residual blocks, then half the resolution, of BHWC or the strips BSHWC."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, compute: Compute, *, downsample: bool
    ):
        self.resnets = _resnets(in_channels, out_channels, layers, groups, compute)
        # Padding 0 stands for one row below and one column to the right, as the LDM encoder has it.
        self.downsamplers = nnx.List([Downsample2D(out_channels, 0, compute)] if downsample else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpDecoderBlock2D(nnx.Module):
    """Residual blocks, then twice the resolution."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, compute: Compute, *, upsample: bool
    ):
        self.resnets = _resnets(in_channels, out_channels, layers, groups, compute)
        self.upsamplers = nnx.List([Upsample2D(out_channels, compute)] if upsample else [])

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x_BHWC = resnet(x_BHWC)
        for upsampler in self.upsamplers:
            x_BHWC = upsampler(x_BHWC, 2 * x_BHWC.shape[1], 2 * x_BHWC.shape[2])
        return x_BHWC


class MidBlock2D(nnx.Module):
    """Two residual blocks with an attention between them, at the lowest resolution."""

    def __init__(self, channels: int, groups: int, compute: Compute, *, add_attention: bool):
        self.attentions = nnx.List([SpatialAttention(channels, groups, compute)] if add_attention else [])
        self.resnets = _resnets(channels, channels, 2, groups, compute)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        first, second = self.resnets
        for layer in (first, *self.attentions, second):
            x_BHWC = layer(x_BHWC)
        return x_BHWC


class VaeResnetBlock2D(nnx.Module):
    """Pre-activation residual block without a time embedding, of BHWC or the strips BSHWC."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, compute: Compute):
        self.norm1 = GroupNorm(groups, in_channels, eps=NORM_EPS, compute=compute)
        self.conv1 = Conv(in_channels, out_channels, 3, compute, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps=NORM_EPS, compute=compute)
        self.conv2 = Conv(out_channels, out_channels, 3, compute, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else Conv(in_channels, out_channels, 1, compute)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(nnx.Module):
    """Single-head self-attention over the positions of a feature map, with a residual around it."""

    def __init__(self, channels: int, groups: int, compute: Compute):
        self.group_norm = GroupNorm(groups, channels, eps=NORM_EPS, compute=compute)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nnx.List([Linear(channels, channels)])
        self.kernel = compute.attention

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        batch, _, _, channels = x_BHWC.shape
        h_BLC = self.group_norm(x_BHWC).reshape(batch, -1, channels)
        query, key, value = (project(h_BLC)[:, :, None, :] for project in (self.to_q, self.to_k, self.to_v))
        h_BLC = self.to_out[0](dot_product_attention(query, key, value, self.kernel)[:, :, 0, :])
        return x_BHWC + h_BLC.reshape(x_BHWC.shape)


def _resnets(in_channels: int, out_channels: int, count: int, groups: int, compute: Compute) -> nnx.List:
    return nnx.List(
        VaeResnetBlock2D(in_channels if index == 0 else out_channels, out_channels, groups, compute)
        for index in range(count)
    )
