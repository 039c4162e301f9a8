"""The typed `config.json` of a UNet and of a ControlNet.

Field names, defaults and meanings are those of diffusers 0.42, so that its files are read and written as they are.
One historical quirk comes along: `attention_head_dim` holds the *number* of attention heads wherever
`num_attention_heads` is absent, and that is everywhere in published checkpoints (diffusers issue 2011).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import msgspec

from shared.models.configs.fields import (
    Channels,
    ChannelsPerBlock,
    Factor,
    Fraction,
    LayersPerBlock,
    Name,
    Names,
    Size,
    SwitchPerBlock,
    Widths,
    check_units,
    told,
    typed_fields,
)
from shared.untrusted import shown
from shared.user_errors import UserError

PerBlock = int | tuple[int, ...]

CROSS_ATTENTION_BLOCKS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
CROSS_ATTENTION_MID_BLOCK = "UNetMidBlock2DCrossAttn"
DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
MID_BLOCKS = (CROSS_ATTENTION_MID_BLOCK, "UNetMidBlock2D")

# Fields of diffusers' configs that exist here only at the value that leaves them without effect.
# `resnet_out_scale_factor` and `mid_block_only_cross_attention` act on block types that are not supported.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_type": ("default",),
    "addition_embed_type_num_heads": (64,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False, None),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dropout": (0.0,),
    "dual_cross_attention": (False, None),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False, None),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What a UNet and its ControlNet share: everything up to the mid block."""

    diffusers_class: ClassVar[str | None]

    in_channels: Channels = 4
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, msgspec.Meta(ge=0, le=1)] = 0
    down_block_types: Names = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: Name = CROSS_ATTENTION_MID_BLOCK
    only_cross_attention: SwitchPerBlock = False
    block_out_channels: Widths = (320, 640, 1280, 1280)
    layers_per_block: LayersPerBlock = 2
    downsample_padding: int = 1
    mid_block_scale_factor: Factor = 1.0
    act_fn: Name = "silu"
    norm_num_groups: Channels = 32
    norm_eps: Fraction = 1e-5
    cross_attention_dim: ChannelsPerBlock = 1280
    transformer_layers_per_block: LayersPerBlock = 1
    attention_head_dim: ChannelsPerBlock = 8
    num_attention_heads: ChannelsPerBlock | None = None
    use_linear_projection: bool = False
    addition_embed_type: Name | None = None
    addition_time_embed_dim: Channels | None = None
    upcast_attention: bool | None = False  # null in SDXL's published file
    projection_class_embeddings_input_dim: Channels | None = None

    @property
    def num_blocks(self) -> int:
        return len(self.down_block_types)

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    @property
    def heads_per_block(self) -> tuple[int, ...]:
        """Attention heads of each resolution; see the module's docstring for the quirk."""
        heads = self.attention_head_dim if self.num_attention_heads is None else self.num_attention_heads
        return self.per_block(heads)

    def per_block(self, value: PerBlock) -> tuple[int, ...]:
        """One value per resolution, from the highest to the lowest."""
        return value if isinstance(value, tuple) else (value,) * self.num_blocks

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a diffusers `config.json`.

        Args:
            values: the parsed file. Keys with a leading underscore are metadata and ignored.
        Raises:
            UserError: a field asks for something that is not implemented here, or contradicts another.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in known and not name.startswith("_"):
                _require_neutral(cls.diffusers_class, name, value)
        return cls(**typed_fields(cls, values, f"{cls.diffusers_class} config"))

    def to_dict(self) -> dict[str, Any]:
        """Fields of a `config.json` that diffusers and `from_dict` read back to the same configuration."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def published_name(cls, name: str) -> str | None:
        """This project's name for a parameter found in a file: the same."""
        return name

    def __post_init__(self) -> None:
        self._check_one_of("act_fn", self.act_fn, ("silu", "swish"))
        self._check_one_of("mid_block_type", self.mid_block_type, MID_BLOCKS)
        self._check_one_of("downsample_padding", self.downsample_padding, (0, 1))
        self._check_one_of("addition_embed_type", self.addition_embed_type, (None, "text_time"))
        for block_type in self.down_block_types:
            self._check_one_of("down_block_types", block_type, DOWN_BLOCKS)
        self._check_block_counts()
        self._check_channels()
        layers = zip(self.per_block(self.layers_per_block), self._transformers_per_block(), strict=True)
        # Once on the way down and once, with one more, on the way up.
        check_units(f"{self.diffusers_class} config", sum((2 * count + 1) * (1 + depth) for count, depth in layers))
        if self.addition_embed_type == "text_time":
            for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                if getattr(self, name) is None:
                    self._refuse(name, None, "a width, because addition_embed_type is 'text_time'")

    def _transformers_per_block(self) -> tuple[int, ...]:
        """Transformer layers in each attention of a resolution, 0 where it has none."""
        depths = zip(self.per_block(self.transformer_layers_per_block), self.down_block_types, strict=True)
        return tuple(depth if block_type in CROSS_ATTENTION_BLOCKS else 0 for depth, block_type in depths)

    def _check_block_counts(self) -> None:
        for name in _PER_BLOCK_FIELDS:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.num_blocks:
                self._refuse(name, value, f"{self.num_blocks} values, one for each of down_block_types")

    def _check_channels(self) -> None:
        for channels, heads in zip(self.block_out_channels, self.heads_per_block, strict=True):
            if channels % self.norm_num_groups:
                self._refuse("block_out_channels", channels, f"multiples of norm_num_groups={self.norm_num_groups}")
            if channels % heads:
                self._refuse("attention_head_dim", heads, f"a number of heads that divides {channels} channels")

    def _check_one_of(self, name: str, value: object, supported: tuple[object, ...]) -> None:
        if value not in supported:
            self._refuse(name, value, " or ".join(map(repr, supported)))

    def _refuse(self, name: str, value: object, expected: str) -> None:
        raise UserError(
            f"{self.diffusers_class} config: {name}={shown(repr(value))} is not supported; expected {expected}."
        )


_PER_BLOCK_FIELDS = (
    "block_out_channels",
    "only_cross_attention",
    "layers_per_block",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
)


@dataclass(frozen=True, kw_only=True)
class UNet2DConditionConfig(EncoderConfig):
    """`unet/config.json` of Stable Diffusion 1.x, 2.x and SDXL."""

    diffusers_class: ClassVar[str | None] = "UNet2DConditionModel"

    sample_size: Size | None = None
    out_channels: Channels = 4
    center_input_sample: bool = False
    up_block_types: Names = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads is not None:
            # diffusers refuses it for this class too, so a file written with it could not be loaded there.
            self._refuse("num_attention_heads", self.num_attention_heads, "null (attention_head_dim holds the heads)")
        for block_type in self.up_block_types:
            self._check_one_of("up_block_types", block_type, UP_BLOCKS)
        if len(self.up_block_types) != self.num_blocks:
            self._refuse("up_block_types", self.up_block_types, f"{self.num_blocks} values, like down_block_types")


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(EncoderConfig):
    """`config.json` of a ControlNet for such a UNet."""

    diffusers_class: ClassVar[str | None] = "ControlNetModel"

    conditioning_channels: Channels = 3
    controlnet_conditioning_channel_order: Name = "rgb"
    conditioning_embedding_out_channels: Widths = (16, 32, 96, 256)
    global_pool_conditions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        order = self.controlnet_conditioning_channel_order
        self._check_one_of("controlnet_conditioning_channel_order", order, ("rgb", "bgr"))
        for name in ("layers_per_block", "cross_attention_dim"):
            if isinstance(getattr(self, name), tuple):
                self._refuse(name, getattr(self, name), "one integer (diffusers' ControlNet knows no list here)")
        if not self.conditioning_embedding_out_channels:
            self._refuse("conditioning_embedding_out_channels", (), "at least one width")

    @classmethod
    def from_unet_config(
        cls,
        unet: UNet2DConditionConfig,
        *,
        conditioning_channels: int = 3,
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
    ) -> Self:
        """The configuration of a ControlNet that can start from this UNet's encoder.

        Raises:
            UserError: the UNet's resolutions differ in a way that a ControlNet's config cannot express.
        """
        shared = {field.name: getattr(unet, field.name) for field in dataclasses.fields(EncoderConfig)}
        for name in ("layers_per_block", "cross_attention_dim"):
            if len(set(unet.per_block(shared[name]))) == 1:
                shared[name] = unet.per_block(shared[name])[0]
        return cls(
            **shared,
            conditioning_channels=conditioning_channels,
            conditioning_embedding_out_channels=tuple(conditioning_embedding_out_channels),
        )


def _require_neutral(class_name: str | None, name: str, value: object) -> None:
    neutral = NEUTRAL_VALUES.get(name, (None, False))
    # False and 0 are equal in Python, and a field of a later release may well count something.
    if any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral):
        return
    expected = " or ".join(map(repr, neutral))
    given, unknown = shown(repr(value)), ""
    if name not in NEUTRAL_VALUES:
        given, unknown = told(value), " (this project does not know the field)"
    raise UserError(
        f"{class_name} config: {shown(name)}={given} is not supported{unknown}; the only supported "
        f"value is {expected}. Choose a checkpoint of the Stable Diffusion 1.x, 2.x or SDXL architecture."
    )
