"""ControlNet (Zhang, Rao and Agrawala 2023, "Adding Conditional Control to Text-to-Image Diffusion Models").

Axes: B batch, H height, W width (of latents; X, Y of the condition, in pixels), C channels, T time embedding features,
L text length, D text features.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_trainer.models.kernels.convolution import to_blocks
from flax_trainer.models.layers.basic import Conv
from flax_trainer.models.layers.compute import PLAINLY, Compute, checkpointed
from flax_trainer.models.params import Params, from_torch_layout, split, torch_shape
from flax_trainer.models.unet import ENCODER_PREFIXES, FlaxUNet2DConditionModel, UNetEncoder, state_channels
from shared.models.configs.unet import ControlNetConfig
from shared.models.initialisation import ModuleKind, initial_values
from shared.user_errors import UserError

ZERO_MODULES = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")


class ControlNetConditioningEmbedding(nnx.Module):
    """The small network that brings the conditioning image to the latents' resolution."""

    def __init__(self, conditioning_channels: int, widths: tuple[int, ...], out_channels: int, compute: Compute):
        self.conv_in = Conv(conditioning_channels, widths[0], 3, compute, padding=1)
        blocks = []
        for width, next_width in itertools.pairwise(widths):
            blocks.append(Conv(width, width, 3, compute, padding=1))
            blocks.append(Conv(width, next_width, 3, compute, stride=2, padding=1))
        self.blocks = nnx.List(blocks)
        self.conv_out = Conv(widths[-1], out_channels, 3, compute, padding=1)
        self.reduction = 2 ** (len(widths) - 1)
        self.checkpointing = compute.checkpointing

    def __call__(self, condition_BYXC: jax.Array) -> jax.Array:
        def embed(condition_BYXC: jax.Array) -> jax.Array:
            block = self._block(condition_BYXC)
            h_BHWC = to_blocks(condition_BYXC, block)
            for conv in (self.conv_in, *self.blocks):
                h_BHWC = nnx.silu(conv(h_BHWC) if block == 1 else conv.on_blocks(h_BHWC, block))
                block = max(1, block // conv.stride)
            return self.conv_out(h_BHWC)

        return checkpointed(embed, self.checkpointing)(condition_BYXC)

    def _block(self, condition_BYXC: jax.Array) -> int:
        """Pixels along the side of the blocks in which to begin. At full resolution the channels are few."""
        block = self.reduction // 2
        height, width = condition_BYXC.shape[1:3]
        return block if self.conv_in.for_tpu and block > 1 and height % block == width % block == 0 else 1


class FlaxControlNetModel(UNetEncoder):
    """diffusers' `ControlNetModel`, channels last.

    A new one has zeros for weights: start it with `from_unet`, load it, or bind parameters to it (see `params.py`).
    """

    config_class = ControlNetConfig
    identity: ClassVar[dict[str, Any]] = {"_class_name": ControlNetConfig.diffusers_class}
    zero_initialised = ZERO_MODULES

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig, compute: Compute = PLAINLY, *, only_mid_control: bool = False):
        """With `only_mid_control` it computes the mid block's residual alone: those of the down blocks are zero."""
        super().__init__(config, compute)
        widths = config.block_out_channels
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            config.conditioning_channels, config.conditioning_embedding_out_channels, widths[0], compute
        )
        self.controlnet_down_blocks = nnx.List([Conv(width, width, 1, compute) for width in state_channels(config)])
        self.controlnet_mid_block = Conv(widths[-1], widths[-1], 1, compute)
        self.only_mid_control = only_mid_control

    def __call__(
        self,
        sample_BHWC: jax.Array,
        timesteps_B: jax.Array,
        encoder_hidden_states_BLD: jax.Array,
        controlnet_cond_BYXC: jax.Array,
        conditioning_scale: float | jax.Array = 1.0,
        *,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The residuals that steer the UNet towards the condition.

        Computes in the sample's dtype; the other arrays are cast to it.

        Args:
            sample_BHWC, timesteps_B, encoder_hidden_states_BLD, added_cond_kwargs: as for the UNet.
            controlnet_cond_BYXC: the conditioning image in [0, 1], 8 times as high and wide as the latents.
            conditioning_scale: a scalar that multiplies every residual.
        Returns:
            One residual for each skip connection of the UNet, and the mid block's, in the sample's dtype. With
            `global_pool_conditions` they are means over H and W, [B, 1, 1, C]; with `only_mid_control` the
            former are missing, an empty tuple.
        Raises:
            UserError: a condition of the wrong size or channel count, or missing SDXL conditions.
        """
        dtype = sample_BHWC.dtype
        text_BLD = encoder_hidden_states_BLD.astype(dtype)
        self._check_condition(sample_BHWC, controlnet_cond_BYXC)
        time_embedding_BT = self.embed_time(timesteps_B, added_cond_kwargs, dtype)

        with jax.named_scope("controlnet_cond_embedding"):
            condition_BHWC = self.controlnet_cond_embedding(self._in_rgb(controlnet_cond_BYXC).astype(dtype))
        x_BHWC = self.conv_in(sample_BHWC) + condition_BHWC
        states = self.run_down_blocks(x_BHWC, time_embedding_BT, text_BLD)
        mid_BHWC = self.run_mid_block(states[-1], time_embedding_BT, text_BLD)

        scale = jnp.asarray(conditioning_scale, dtype)
        with jax.named_scope("controlnet_zero_convolutions"):
            pairs = () if self.only_mid_control else zip(self.controlnet_down_blocks, states, strict=True)
            down = tuple(self._pooled(zero_conv(state) * scale) for zero_conv, state in pairs)
            return down, self._pooled(self.controlnet_mid_block(mid_BHWC) * scale)

    @classmethod
    def from_unet(
        cls,
        unet: FlaxUNet2DConditionModel,
        *,
        conditioning_channels: int = 3,
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """A new ControlNet that leaves the UNet's output as it is: see `controlnet_params_from_unet`.

        `options` are those of the constructor.

        Raises:
            UserError: the UNet's architecture is one that diffusers' ControlNet cannot express.
        """
        config = ControlNetConfig.from_unet_config(
            unet.config,
            conditioning_channels=conditioning_channels,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
        )
        definition, abstract = split(cls.abstract(config, **options))
        _, unet_params = split(unet)
        return definition.bind(controlnet_params_from_unet(unet_params, abstract, definition.layouts, seed))

    def _check_condition(self, sample_BHWC: jax.Array, condition_BYXC: jax.Array) -> None:
        reduction = self.controlnet_cond_embedding.reduction
        height, width, channels = condition_BYXC.shape[1:]
        reduced = (math.ceil(height / reduction), math.ceil(width / reduction))
        if channels != self.config.conditioning_channels or reduced != sample_BHWC.shape[1:3]:
            latent_height, latent_width = sample_BHWC.shape[1:3]
            expected = (latent_height * reduction, latent_width * reduction, self.config.conditioning_channels)
            raise UserError(
                f"controlnet_cond has height, width, channels {(height, width, channels)}; latents of "
                f"{latent_height}x{latent_width} need {expected}. Resize the conditioning image, or choose a "
                "ControlNet with that conditioning_channels."
            )

    def _in_rgb(self, condition_BYXC: jax.Array) -> jax.Array:
        is_bgr = self.config.controlnet_conditioning_channel_order == "bgr"
        return jnp.flip(condition_BYXC, axis=-1) if is_bgr else condition_BYXC

    def _pooled(self, residual_BHWC: jax.Array) -> jax.Array:
        if self.config.global_pool_conditions:
            return residual_BHWC.mean(axis=(1, 2), keepdims=True)
        return residual_BHWC


def controlnet_params_from_unet(
    unet_params: Mapping[str, jax.Array | np.ndarray], abstract: Params, layouts: Mapping[str, str], seed: int
) -> Params:
    """The starting point of a training: the UNet's encoder, a fresh conditioning network, zero convolutions.

    Args:
        unet_params: the UNet's parameters, in any floating dtype.
        abstract: the ControlNet's parameters as `jax.ShapeDtypeStruct`s, and
        layouts: their layouts; `split(FlaxControlNetModel.abstract(config))` gives both.
        seed: of the conditioning network, whose values are those of `shared.models.initialisation` in either backend.
    Returns:
        New arrays in the dtypes of `abstract`, sharing no memory with the UNet's, so that they may be donated.
    Raises:
        UserError: the UNet lacks one of the encoder's parameters, or has it in another shape.
    """
    encoder = {name: value for name, value in abstract.items() if name.startswith(ENCODER_PREFIXES)}
    _check_same_encoder(unet_params, encoder)
    params = {name: jnp.array(unet_params[name], value.dtype, copy=True) for name, value in encoder.items()}

    fresh_shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in (name for name in abstract if name not in encoder):
        module, _, key = name.rpartition(".")
        fresh_shapes.setdefault(module, {})[key] = torch_shape(abstract[name].shape, layouts[name])
    for module, shapes in fresh_shapes.items():
        kind = ModuleKind.ZERO if module.startswith(ZERO_MODULES) else ModuleKind.AFFINE
        for key, drawn in initial_values(seed, module, kind, shapes).items():
            name = f"{module}.{key}"
            params[name] = jnp.asarray(from_torch_layout(drawn, layouts[name]), abstract[name].dtype)
    return params


def _check_same_encoder(unet_params: Mapping[str, jax.Array | np.ndarray], encoder: Params) -> None:
    for name, wanted in encoder.items():
        found = list(unet_params[name].shape) if name in unet_params else "nothing"
        if found != list(wanted.shape):
            raise UserError(
                f"The ControlNet starts from the UNet's {name} of shape {list(wanted.shape)} and the UNet has {found}; "
                "use the configuration that ControlNetConfig.from_unet_config makes of this UNet's."
            )
