"""The typed `config.json` of an `AutoencoderKL`."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from shared.models.configs.fields import Channels, Factor, Layers, Size, Widths, check_units, told, typed_fields
from shared.untrusted import shown
from shared.user_errors import UserError

# diffusers before 0.15 and the LDM conversion scripts call the mid block's attention like this.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_NAME = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")

# Fields of diffusers' config that exist here only at the values that leave them without effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None, 0.0),
    "latents_mean": (None,),
    "latents_std": (None,),
}


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """The `config.json` of an `AutoencoderKL`. Names, defaults and meanings are diffusers'.

    `scaling_factor` multiplies latents before the diffusion model and divides them before `decode`; neither `encode`
    nor `decode` applies it. `force_upcast` tells a trainer in half precision to keep this model in float32.
    """

    diffusers_class: ClassVar[str | None] = "AutoencoderKL"

    in_channels: Channels = 3
    out_channels: Channels = 3
    block_out_channels: Widths = (64,)
    layers_per_block: Layers = 1
    latent_channels: Channels = 4
    norm_num_groups: Channels = 32
    sample_size: Size | None = 32
    scaling_factor: Factor = 0.18215
    force_upcast: bool | None = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        uneven = [channels for channels in self.block_out_channels if channels % self.norm_num_groups]
        if uneven:
            raise UserError(
                f"block_out_channels is {list(self.block_out_channels)} and norm_num_groups {self.norm_num_groups}: "
                f"expected channels that the groups divide, which {uneven} are not. Correct the VAE's config.json."
            )
        check_units("The VAE's config.json", len(self.block_out_channels) * (2 * self.layers_per_block + 1))

    @property
    def scale_factor(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a `config.json`; keys that begin with an underscore are diffusers' own notes and are passed over.

        Raises:
            UserError: a field asks for something that is not implemented, or is not known.
        """
        given = {key: value for key, value in values.items() if not key.startswith("_")}
        config = cls(**typed_fields(cls, given, "The VAE's config.json"))
        fields = {field.name for field in dataclasses.fields(cls)}
        blocks = len(config.block_out_channels)
        allowed = _NEUTRAL | {
            "down_block_types": (("DownEncoderBlock2D",) * blocks,),
            "up_block_types": (("UpDecoderBlock2D",) * blocks,),
        }
        for key, value in given.items():
            if key not in fields and _hashable(value) not in allowed.get(key, (None,)):
                expected = " or ".join(repr(choice) for choice in allowed.get(key, (None,)))
                given_value = shown(repr(value)) if key in allowed else told(value)
                raise UserError(
                    f"The VAE's config.json has {shown(key)}={given_value}, which is not supported: expected "
                    f"{expected}. Use an AutoencoderKL of Stable Diffusion 1.x, 2.x or XL."
                )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields as diffusers writes them."""
        blocks = len(self.block_out_channels)
        values = dataclasses.asdict(self)
        values |= {"act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None}
        values |= {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def published_name(cls, name: str) -> str | None:
        """Old names of the attention's projections become the present ones."""
        match = _OLD_ATTENTION_NAME.fullmatch(name)
        return f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}" if match else name


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
