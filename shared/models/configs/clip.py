"""The typed `config.json` of a CLIP text encoder."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from shared.models.configs.fields import Channels, Count, Fraction, Layers, Name, Positive, typed_fields
from shared.untrusted import shown
from shared.user_errors import UserError

ACTIVATIONS = ("quick_gelu", "gelu")

_POSITION_IDS = "embeddings.position_ids"
_PREFIX = "text_model."
_UNPREFIXED = ("embeddings.", "encoder.", "final_layer_norm.")


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """The architecture's part of a CLIP text encoder's `config.json`; names, defaults and meanings of transformers."""

    diffusers_class: ClassVar[str | None] = None

    vocab_size: Positive = 49408
    hidden_size: Channels = 512
    intermediate_size: Channels = 2048
    projection_dim: Channels = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Channels = 8
    max_position_embeddings: Channels = 77
    hidden_act: Name = "quick_gelu"
    layer_norm_eps: Fraction = 1e-5
    pad_token_id: int | None = 1  # neither is read, here or in transformers' model
    bos_token_id: int | None = 49406
    eos_token_id: Count = 49407

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"The text encoder's config.json has hidden_act={shown(repr(self.hidden_act))}, which is not "
                f"supported: expected {' or '.join(ACTIVATIONS)}. Use a CLIP text encoder of Stable Diffusion 1.x, 2.x "
                "or XL."
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size is {self.hidden_size} and num_attention_heads {self.num_attention_heads}: expected heads "
                "that divide the size. Correct the text encoder's config.json."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a `config.json` of transformers 4 or 5; its many generation and training settings are passed over.

        Raises:
            UserError: it describes another kind of model, or something that is not implemented.
        """
        model_type = values.get("model_type", "clip_text_model")
        if model_type != "clip_text_model":
            raise UserError(
                f"config.json has model_type={shown(repr(model_type))}: expected 'clip_text_model', CLIP's text "
                "encoder alone. Pass the text_encoder folder of a Stable Diffusion 1.x, 2.x or XL pipeline."
            )
        if not isinstance(values.get("eos_token_id", 0), int):
            raise UserError(
                f"The text encoder's config.json has eos_token_id={shown(repr(values['eos_token_id']))}: expected one "
                "integer."
            )
        return cls(**typed_fields(cls, values, "The text encoder's config.json"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as transformers writes them."""
        return dataclasses.asdict(self)

    @classmethod
    def published_name(cls, name: str) -> str | None:
        """transformers 5 leaves out the prefix in some files, and older files carry a constant table of positions."""
        if name.endswith(_POSITION_IDS):
            return None
        return f"{_PREFIX}{name}" if name.startswith(_UNPREFIXED) else name
