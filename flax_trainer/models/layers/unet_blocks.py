"""The UNet's down, mid and up blocks, with and without attention.

Axes: B batch, H height, W width, C channels, T time embedding features, L text length, D text features.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_trainer.models.layers.compute import CheckpointingPolicy, checkpointed
from flax_trainer.models.layers.resnet import Downsample2D, ResnetBlock2D, ResnetSpec, Upsample2D
from flax_trainer.models.layers.transformer import Transformer2DModel, TransformerSpec


class UNetBlock(nnx.Module):
    """Base class of the blocks: it runs one layer, a residual block and the transformer after it."""

    resnets: nnx.List
    attentions: nnx.List | None
    checkpointing: CheckpointingPolicy | None

    def run_layer(
        self,
        index: int,
        parts_BHWC: tuple[jax.Array, ...],
        time_embedding_BT: jax.Array,
        encoder_hidden_states_BLD: jax.Array,
    ) -> jax.Array:
        """The hidden states after a layer, whose input comes in parts, side by side in the channels."""

        def layer(
            parts_BHWC: tuple[jax.Array, ...], time_embedding_BT: jax.Array, encoder_hidden_states_BLD: jax.Array
        ) -> jax.Array:
            x_BHWC = self.resnets[index](jnp.concatenate(parts_BHWC, axis=-1), time_embedding_BT)
            if self.attentions is not None and index < len(self.attentions):
                x_BHWC = self.attentions[index](x_BHWC, encoder_hidden_states_BLD)
            return x_BHWC

        return checkpointed(layer, self.checkpointing)(parts_BHWC, time_embedding_BT, encoder_hidden_states_BLD)


class DownBlock2D(UNetBlock):
    """`DownBlock2D`, or `CrossAttnDownBlock2D` where a transformer is given.

    Args:
        downsample_padding: of the convolution that halves the resolution at the end; None for a block without it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_layers: int,
        resnet: ResnetSpec,
        transformer: TransformerSpec | None,
        downsample_padding: int | None,
    ):
        widths = [in_channels, *[out_channels] * (num_layers - 1)]
        self.resnets = nnx.List([ResnetBlock2D(width, out_channels, resnet) for width in widths])
        self.attentions = _transformers(out_channels, num_layers, transformer)
        self.downsamplers = (
            None
            if downsample_padding is None
            else nnx.List([Downsample2D(out_channels, downsample_padding, resnet.compute)])
        )
        self.checkpointing = resnet.compute.checkpointing

    def __call__(
        self, x_BHWC: jax.Array, time_embedding_BT: jax.Array, encoder_hidden_states_BLD: jax.Array
    ) -> tuple[jax.Array, ...]:
        """The hidden states after every layer and after the downsampler; the last one goes on to the next block."""
        states = []
        for index in range(len(self.resnets)):
            x_BHWC = self.run_layer(index, (x_BHWC,), time_embedding_BT, encoder_hidden_states_BLD)
            states.append(x_BHWC)
        if self.downsamplers is not None:
            states.append(self.downsamplers[0](x_BHWC))
        return tuple(states)


class MidBlock2D(UNetBlock):
    """`UNetMidBlock2DCrossAttn` (residual, transformer, residual), or `UNetMidBlock2D` (one residual) without one."""

    def __init__(self, channels: int, *, resnet: ResnetSpec, transformer: TransformerSpec | None):
        count = 1 if transformer is None else 2
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, resnet) for _ in range(count)])
        self.attentions = _transformers(channels, 1, transformer)
        self.checkpointing = resnet.compute.checkpointing

    def __call__(
        self, x_BHWC: jax.Array, time_embedding_BT: jax.Array, encoder_hidden_states_BLD: jax.Array
    ) -> jax.Array:
        for index in range(len(self.resnets)):
            x_BHWC = self.run_layer(index, (x_BHWC,), time_embedding_BT, encoder_hidden_states_BLD)
        return x_BHWC


class UpBlock2D(UNetBlock):
    """`UpBlock2D`, or `CrossAttnUpBlock2D` where a transformer is given.

    Args:
        in_channels: of what comes from the block below.
        skip_channels: of the encoder's states that this block takes, in the order in which it takes them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        skip_channels: tuple[int, ...],
        resnet: ResnetSpec,
        transformer: TransformerSpec | None,
        add_upsample: bool,
    ):
        widths = [in_channels, *[out_channels] * (len(skip_channels) - 1)]
        self.resnets = nnx.List(
            [ResnetBlock2D(w + skip, out_channels, resnet) for w, skip in zip(widths, skip_channels, strict=True)]
        )
        self.attentions = _transformers(out_channels, len(skip_channels), transformer)
        self.upsamplers = nnx.List([Upsample2D(out_channels, resnet.compute)]) if add_upsample else None
        self.checkpointing = resnet.compute.checkpointing

    def __call__(
        self,
        x_BHWC: jax.Array,
        skips_BHWC: tuple[jax.Array, ...],
        time_embedding_BT: jax.Array,
        encoder_hidden_states_BLD: jax.Array,
        *,
        size: tuple[int, int] | None,
    ) -> jax.Array:
        """Merge the encoder's states, then enlarge.

        Args:
            skips_BHWC: the encoder's states in the order in which they are taken, one for each layer.
            size: height and width to enlarge to; None where the block has no upsampler.
        """
        assert len(skips_BHWC) == len(self.resnets), (len(skips_BHWC), len(self.resnets))
        for index, skip_BHWC in enumerate(skips_BHWC):
            x_BHWC = self.run_layer(index, (x_BHWC, skip_BHWC), time_embedding_BT, encoder_hidden_states_BLD)
        if self.upsamplers is not None:
            assert size is not None
            x_BHWC = self.upsamplers[0](x_BHWC, *size)
        return x_BHWC


def _transformers(channels: int, count: int, spec: TransformerSpec | None) -> nnx.List | None:
    return None if spec is None else nnx.List([Transformer2DModel(channels, spec) for _ in range(count)])
