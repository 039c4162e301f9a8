"""The typed `config.json` of a UNet and of a ControlNet.

Field names, defaults and meanings are those of diffusers 0.42, so that its files are read and written as they are.
One historical quirk comes along: `attention_head_dim` holds the *number* of attention heads wherever
`num_attention_heads` is absent, and that is everywhere in published checkpoints (diffusers issue 2011).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

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

    diffusers_class: ClassVar[str]

    in_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str = CROSS_ATTENTION_MID_BLOCK
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: PerBlock = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: PerBlock = 1280
    transformer_layers_per_block: PerBlock = 1
    attention_head_dim: PerBlock = 8
    num_attention_heads: PerBlock | None = None
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    upcast_attention: bool = False
    projection_class_embeddings_input_dim: int | None = None

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
            ValueError: a field asks for something that is not implemented here, or contradicts another.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in known and not name.startswith("_"):
                _require_neutral(cls.diffusers_class, name, value)
        return cls(**{name: _tupled(value) for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """Fields of a `config.json` that diffusers and `from_dict` read back to the same configuration."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def __post_init__(self) -> None:
        self._check_one_of("act_fn", self.act_fn, ("silu", "swish"))
        self._check_one_of("mid_block_type", self.mid_block_type, MID_BLOCKS)
        self._check_one_of("downsample_padding", self.downsample_padding, (0, 1))
        self._check_one_of("addition_embed_type", self.addition_embed_type, (None, "text_time"))
        for block_type in self.down_block_types:
            self._check_one_of("down_block_types", block_type, DOWN_BLOCKS)
        self._check_block_counts()
        self._check_channels()
        if self.addition_embed_type == "text_time":
            for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                if getattr(self, name) is None:
                    self._refuse(name, None, "a width, because addition_embed_type is 'text_time'")

    def _check_block_counts(self) -> None:
        for name in _PER_BLOCK_FIELDS:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.num_blocks:
                self._refuse(name, value, f"{self.num_blocks} values, one for each of down_block_types")

    def _check_channels(self) -> None:
        if not isinstance(self.norm_num_groups, int):
            self._refuse("norm_num_groups", self.norm_num_groups, "an integer")
        for name in _PER_BLOCK_FIELDS:
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if not isinstance(value, int) and not (name == "num_attention_heads" and value is None):
                    self._refuse(name, values, "an integer, or a list of one integer for each of down_block_types")
        for channels, heads in zip(self.block_out_channels, self.heads_per_block, strict=True):
            if channels % self.norm_num_groups:
                self._refuse("block_out_channels", channels, f"multiples of norm_num_groups={self.norm_num_groups}")
            if channels % heads:
                self._refuse("attention_head_dim", heads, f"a number of heads that divides {channels} channels")

    def _check_one_of(self, name: str, value: object, supported: tuple[object, ...]) -> None:
        if value not in supported:
            self._refuse(name, value, " or ".join(map(repr, supported)))

    def _refuse(self, name: str, value: object, expected: str) -> None:
        raise ValueError(f"{self.diffusers_class} config: {name}={value!r} is not supported; expected {expected}.")


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

    diffusers_class: ClassVar[str] = "UNet2DConditionModel"

    sample_size: PerBlock | None = None
    out_channels: int = 4
    center_input_sample: bool = False
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)

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

    diffusers_class: ClassVar[str] = "ControlNetModel"

    conditioning_channels: int = 3
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
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
            ValueError: the UNet's resolutions differ in a way that a ControlNet's config cannot express.
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


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list | tuple) else value


def _require_neutral(class_name: str, name: str, value: object) -> None:
    neutral = NEUTRAL_VALUES.get(name, (None, False))
    # False and 0 are equal in Python, and a field of a later release may well count something.
    if any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral):
        return
    expected = " or ".join(map(repr, neutral))
    unknown = "" if name in NEUTRAL_VALUES else " (this project does not know the field)"
    raise ValueError(
        f"{class_name} config: {name}={value!r} is not supported{unknown}; the only supported value is {expected}. "
        "Choose a checkpoint of the Stable Diffusion 1.x, 2.x or SDXL architecture."
    )
