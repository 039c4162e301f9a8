"""The denoising UNet of Stable Diffusion 1.x, 2.x and SDXL, and the half of it that a ControlNet copies.

Axes: B batch, H height, W width, C channels, T time embedding features, L text length, D text features,
P pooled text features, I SDXL's six size numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from flax_trainer.models.layers.basic import Conv, GroupNorm
from flax_trainer.models.layers.compute import PLAINLY, Compute
from flax_trainer.models.layers.embeddings import TimestepEmbedding, timestep_embedding
from flax_trainer.models.layers.resnet import ResnetSpec
from flax_trainer.models.layers.transformer import TransformerSpec
from flax_trainer.models.layers.unet_blocks import DownBlock2D, MidBlock2D, UpBlock2D
from flax_trainer.models.pretrained import PretrainedModel
from shared.models.configs.unet import (
    CROSS_ATTENTION_BLOCKS,
    CROSS_ATTENTION_MID_BLOCK,
    EncoderConfig,
    UNet2DConditionConfig,
)
from shared.user_errors import UserError

ENCODER_PREFIXES = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")


class UNetEncoder(PretrainedModel):
    """What a UNet and its ControlNet have in common: the path down to the mid block.

    These parts stand at the root, where diffusers' names want them.
    """

    config: EncoderConfig

    def __init__(self, config: EncoderConfig, compute: Compute):
        super().__init__(config)
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0], 3, compute, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_embed_dim)
        self.add_embedding = _add_embedding(config)
        self.down_blocks = nnx.List([_down_block(config, compute, index) for index in range(config.num_blocks)])
        self.mid_block = _mid_block(config, compute)

    def embed_time(
        self, timesteps_B: jax.Array, added_cond_kwargs: Mapping[str, jax.Array] | None, dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        """The vector [B, T] that every residual block receives: the timestep and, in SDXL, pooled text and sizes."""
        config = self.config
        sinusoids_BC = self._sinusoids(timesteps_B, config.block_out_channels[0])
        embedding_BT = self.time_embedding(sinusoids_BC.astype(dtype))
        if self.add_embedding is None:
            return embedding_BT
        text_embeds_BP, time_ids_BI = _required_conditions(added_cond_kwargs)
        assert config.addition_time_embed_dim is not None  # the configuration has checked it
        sizes = self._sinusoids(time_ids_BI.reshape(-1), config.addition_time_embed_dim)
        sizes = sizes.reshape(time_ids_BI.shape[0], -1)
        added = jnp.concatenate((text_embeds_BP.astype(dtype), sizes.astype(dtype)), axis=-1)
        return embedding_BT + self.add_embedding(added)

    def run_down_blocks(
        self, x_BHWC: jax.Array, time_embedding_BT: jax.Array, encoder_hidden_states_BLD: jax.Array
    ) -> tuple[jax.Array, ...]:
        """The embedded sample and every state on the way down, from first to last."""
        states = [x_BHWC]
        for index, block in enumerate(self.down_blocks):
            with jax.named_scope(f"down_blocks.{index}"):
                states.extend(block(states[-1], time_embedding_BT, encoder_hidden_states_BLD))
        return tuple(states)

    def run_mid_block(
        self, x_BHWC: jax.Array, time_embedding_BT: jax.Array, encoder_hidden_states_BLD: jax.Array
    ) -> jax.Array:
        with jax.named_scope("mid_block"):
            return self.mid_block(x_BHWC, time_embedding_BT, encoder_hidden_states_BLD)

    def _sinusoids(self, numbers: jax.Array, features: int) -> jax.Array:
        config = self.config
        return timestep_embedding(
            numbers, features, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )


class FlaxUNet2DConditionModel(UNetEncoder):
    """diffusers' `UNet2DConditionModel`, channels last (Rombach et al. 2022; Podell et al. 2023 for SDXL).

    A new one has zeros for weights: load it, or bind parameters to it (see `params.py`).
    """

    config_class = UNet2DConditionConfig
    identity: ClassVar[dict[str, Any]] = {"_class_name": UNet2DConditionConfig.diffusers_class}

    config: UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig, compute: Compute = PLAINLY):
        super().__init__(config, compute)
        width = config.block_out_channels[0]
        self.up_blocks = nnx.List(_up_blocks(config, compute))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, width, eps=config.norm_eps, compute=compute)
        self.conv_out = Conv(width, config.out_channels, 3, compute, padding=1)

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
                One with `only_mid_control` has an empty sequence of the former.
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


def state_channels(config: EncoderConfig) -> list[int]:
    """C of each of `UNetEncoder.run_down_blocks`' states: so of every skip connection and ControlNet residual."""
    channels = [config.block_out_channels[0]]
    layers_per_block = config.per_block(config.layers_per_block)
    for index, width in enumerate(config.block_out_channels):
        has_downsampler = index < config.num_blocks - 1
        channels += [width] * (layers_per_block[index] + has_downsampler)
    return channels


def _resnet_spec(config: EncoderConfig, compute: Compute, *, output_scale_factor: float = 1.0) -> ResnetSpec:
    """The residual blocks' common traits under this configuration."""
    return ResnetSpec(compute, config.time_embed_dim, config.norm_num_groups, config.norm_eps, output_scale_factor)


def _transformer_spec(
    config: EncoderConfig, compute: Compute, block_type: str, resolution: int
) -> TransformerSpec | None:
    """The transformers of a block at a resolution (0 is the highest); None for a block type without attention."""
    if block_type not in (*CROSS_ATTENTION_BLOCKS, CROSS_ATTENTION_MID_BLOCK):
        return None
    # As in diffusers, `only_cross_attention` does not reach the mid block.
    only_cross_attention = (
        block_type in CROSS_ATTENTION_BLOCKS and config.per_block(config.only_cross_attention)[resolution]
    )
    return TransformerSpec(
        compute,
        heads=config.heads_per_block[resolution],
        layers=config.per_block(config.transformer_layers_per_block)[resolution],
        cross_attention_dim=config.per_block(config.cross_attention_dim)[resolution],
        norm_num_groups=config.norm_num_groups,
        use_linear_projection=config.use_linear_projection,
        only_cross_attention=bool(only_cross_attention),
    )


def _add_embedding(config: EncoderConfig) -> TimestepEmbedding | None:
    if config.addition_embed_type is None:
        return None
    assert config.projection_class_embeddings_input_dim is not None  # the configuration has checked it
    return TimestepEmbedding(config.projection_class_embeddings_input_dim, config.time_embed_dim)


def _down_block(config: EncoderConfig, compute: Compute, index: int) -> DownBlock2D:
    widths = config.block_out_channels
    return DownBlock2D(
        widths[max(index - 1, 0)],
        widths[index],
        num_layers=config.per_block(config.layers_per_block)[index],
        resnet=_resnet_spec(config, compute),
        transformer=_transformer_spec(config, compute, config.down_block_types[index], index),
        downsample_padding=config.downsample_padding if index < config.num_blocks - 1 else None,
    )


def _mid_block(config: EncoderConfig, compute: Compute) -> MidBlock2D:
    return MidBlock2D(
        config.block_out_channels[-1],
        resnet=_resnet_spec(config, compute, output_scale_factor=config.mid_block_scale_factor),
        transformer=_transformer_spec(config, compute, config.mid_block_type, config.num_blocks - 1),
    )


def _required_conditions(added_cond_kwargs: Mapping[str, jax.Array] | None) -> tuple[jax.Array, jax.Array]:
    given = dict(added_cond_kwargs or {})
    missing = [name for name in ("text_embeds", "time_ids") if name not in given]
    if missing:
        raise UserError(
            f"added_cond_kwargs has {sorted(given)}; this model (addition_embed_type 'text_time', SDXL) also needs "
            f"{missing}: text_embeds [B, P] is the pooled text embedding, time_ids [B, 6] are SDXL's sizes and crops."
        )
    return given["text_embeds"], given["time_ids"]


def _up_blocks(config: UNet2DConditionConfig, compute: Compute) -> list[UpBlock2D]:
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
            resnet=_resnet_spec(config, compute),
            transformer=_transformer_spec(config, compute, block_type, resolution),
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
