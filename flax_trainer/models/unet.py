"""The denoising UNet of Stable Diffusion 1.x, 2.x and SDXL.

Axes: B batch, H height, W width, C channels, T time embedding features, L text length, D text features.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
from flax import nnx

from flax_trainer.models.layers.basic import Conv, GroupNorm
from flax_trainer.models.layers.unet_blocks import UpBlock2D
from flax_trainer.models.unet_encoder import UNetEncoder, resnet_spec, state_channels, transformer_spec
from shared.models.configs.unet import UNet2DConditionConfig
from shared.user_errors import UserError


class FlaxUNet2DConditionModel(UNetEncoder):
    """diffusers' `UNet2DConditionModel`, channels last (Rombach et al. 2022; Podell et al. 2023 for SDXL).

    A new one has zeros for weights: load it, or bind parameters to it (see `functional.py`).
    """

    config_class = UNet2DConditionConfig
    identity: ClassVar[dict[str, Any]] = {"_class_name": UNet2DConditionConfig.diffusers_class}

    config: UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig):
        super().__init__(config)
        width = config.block_out_channels[0]
        self.up_blocks = nnx.List(_up_blocks(config))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, width, eps=config.norm_eps)
        self.conv_out = Conv(width, config.out_channels, 3, padding=1)

    def __call__(
        self,
        sample_BHWC: jax.Array,
        timesteps_B: jax.Array,
        encoder_hidden_states_BLD: jax.Array,
        *,
        down_block_additional_residuals: Sequence[jax.Array] | None = None,
        mid_block_additional_residual: jax.Array | None = None,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Predict what the model was trained to predict (noise, velocity or sample) from noisy latents.

        Computes in the sample's dtype; the other arrays are cast to it.

        Args:
            sample_BHWC: noisy latents, in units of the schedule (about unit variance); any H and W.
            timesteps_B: diffusion steps in [0, 1000).
            encoder_hidden_states_BLD: the prompt's hidden states.
            down_block_additional_residuals, mid_block_additional_residual: what a ControlNet returns; both or neither.
                One of `enable_only_mid_control` has an empty sequence of the former.
            added_cond_kwargs: SDXL only: `text_embeds` [B, P] and `time_ids` [B, 6] in pixels.
        Returns:
            [B, H, W, out_channels] in the sample's dtype.
        Raises:
            UserError: residuals that do not come in a full set, or missing SDXL conditions.
        """
        dtype = sample_BHWC.dtype
        text_BLD = encoder_hidden_states_BLD.astype(dtype)
        if self.config.center_input_sample:
            sample_BHWC = 2 * sample_BHWC - 1
        time_embedding_BT = self.embed_time(timesteps_B, added_cond_kwargs, dtype)

        skips = self.run_down_blocks(self.conv_in(sample_BHWC), time_embedding_BT, text_BLD)
        x_BHWC = self.run_mid_block(skips[-1], time_embedding_BT, text_BLD)
        if down_block_additional_residuals is not None and mid_block_additional_residual is not None:
            skips = _add_residuals(skips, down_block_additional_residuals)
            x_BHWC = x_BHWC + mid_block_additional_residual.astype(dtype)
        elif down_block_additional_residuals is not None or mid_block_additional_residual is not None:
            raise UserError(
                "Only one of down_block_additional_residuals and mid_block_additional_residual was given; "
                "pass both of the values that a ControlNet returns, or neither."
            )
        x_BHWC = self._run_up_blocks(x_BHWC, skips, time_embedding_BT, text_BLD)
        return self.conv_out(nnx.silu(self.conv_norm_out(x_BHWC)))

    def _run_up_blocks(
        self,
        x_BHWC: jax.Array,
        skips_BHWC: tuple[jax.Array, ...],
        time_embedding_BT: jax.Array,
        encoder_hidden_states_BLD: jax.Array,
    ) -> jax.Array:
        remaining = list(skips_BHWC)
        for index, block in enumerate(self.up_blocks):
            taken = tuple(remaining.pop() for _ in block.resnets)
            # The size of the next skip connection, not twice the present one: the two differ for odd sizes.
            size = (remaining[-1].shape[1], remaining[-1].shape[2]) if remaining else None
            with jax.named_scope(f"up_blocks.{index}"):
                x_BHWC = block(x_BHWC, taken, time_embedding_BT, encoder_hidden_states_BLD, size=size)
        return x_BHWC


def _up_blocks(config: UNet2DConditionConfig) -> list[UpBlock2D]:
    """From the lowest resolution to the highest, each taking its resolution's states and the one before them."""
    blocks = []
    remaining = state_channels(config)
    x_channels = config.block_out_channels[-1]
    for index, block_type in enumerate(config.up_block_types):
        resolution = config.num_blocks - 1 - index
        layers = config.per_block(config.layers_per_block)[resolution] + 1
        block = UpBlock2D(
            x_channels,
            config.block_out_channels[resolution],
            skip_channels=tuple(remaining.pop() for _ in range(layers)),
            resnet=resnet_spec(config),
            transformer=transformer_spec(config, block_type, resolution),
            add_upsample=resolution > 0,
        )
        x_channels = config.block_out_channels[resolution]
        blocks.append(block)
    return blocks


def _add_residuals(skips_BHWC: tuple[jax.Array, ...], residuals: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    if not residuals:
        return skips_BHWC
    if len(residuals) != len(skips_BHWC):
        raise UserError(
            f"down_block_additional_residuals has {len(residuals)} arrays and this UNet has {len(skips_BHWC)} skip "
            "connections; use a ControlNet made from the same architecture."
        )
    pairs = zip(skips_BHWC, residuals, strict=True)
    return tuple(skip_BHWC + residual.astype(skip_BHWC.dtype) for skip_BHWC, residual in pairs)
