"""Whether the models of a run belong together, told from their configurations."""

from collections.abc import Sequence
from typing import Any

from shared.models.source import shown_name
from shared.user_errors import UserError


def check_models_fit(
    base: str,
    unet: Any,
    text_encoder: Any,
    vae: Any,
    controlnet: Any,
    text_encoder_2: Any | None = None,
    conditioning_channels: int = 3,
) -> None:
    """Refuse models that cannot work together, before anything is computed.

    Args:
        base: what the user calls the base model.
        unet, text_encoder, vae, controlnet: their configurations, with the attributes of diffusers' (for the text
            encoder, transformers') `config.json`.
        text_encoder_2: that of Stable Diffusion XL.
        conditioning_channels: of all conditions, side by side, that the ControlNet is to take.

    Raises:
        UserError: the first thing that does not fit.
    """
    for what, (one, other) in _text_features(unet, text_encoder, text_encoder_2).items():
        if one != other:
            raise UserError(
                f"These models do not belong together: the {what} are {one} and {other}. {shown_name(base)} has parts "
                "of several models: download or copy the whole model again."
            )
    pairs = {
        "channels of the UNet (in_channels) and the VAE (latent_channels)": (unet.in_channels, vae.latent_channels),
        "channels of the UNet (in_channels and out_channels)": (unet.in_channels, unet.out_channels),
        "channels of RGB images and the VAE (in_channels)": (3, vae.in_channels),
        "channels of RGB images and the VAE (out_channels)": (3, vae.out_channels),
        "channels (in_channels) of the UNet and the ControlNet": (unet.in_channels, controlnet.in_channels),
        "text features (cross_attention_dim) of the UNet and the ControlNet": (
            unet.cross_attention_dim,
            controlnet.cross_attention_dim,
        ),
        "block_out_channels of the UNet and the ControlNet": (unet.block_out_channels, controlnet.block_out_channels),
        "layers_per_block of the UNet and the ControlNet": (unet.layers_per_block, controlnet.layers_per_block),
        "addition_embed_type of the UNet and the ControlNet": (
            unet.addition_embed_type,
            controlnet.addition_embed_type,
        ),
        "pixels along each side that become one, of the VAE (block_out_channels) and the ControlNet "
        "(conditioning_embedding_out_channels)": (
            _reduction(vae.block_out_channels),
            _reduction(controlnet.conditioning_embedding_out_channels),
        ),
    } | (_added_features(unet, controlnet) if text_encoder_2 is not None else {})
    for what, (one, other) in pairs.items():
        if _plain(one) != _plain(other):
            raise UserError(
                f"These models do not belong together: the {what} are {one} and {other}. Give a ControlNet and a VAE "
                f"that were made for {shown_name(base)}."
            )
    if controlnet.conditioning_channels != conditioning_channels:
        raise UserError(
            f"--conditioning_channels is {conditioning_channels}, but the ControlNet takes conditions of "
            f"{controlnet.conditioning_channels} channels (conditioning_channels in its config.json): give "
            f"conditions of so many, or another ControlNet for {shown_name(base)}."
        )


def _text_features(unet: Any, text_encoder: Any, text_encoder_2: Any | None) -> dict[str, tuple[Any, Any]]:
    if text_encoder_2 is None:
        return {
            "text features of the UNet (cross_attention_dim) and the text encoder (hidden_size)": (
                unet.cross_attention_dim,
                text_encoder.hidden_size,
            )
        }
    return {
        "text features of the UNet (cross_attention_dim) and both text encoders (hidden_size)": (
            unet.cross_attention_dim,
            text_encoder.hidden_size + text_encoder_2.hidden_size,
        ),
        "added features of the UNet (projection_class_embeddings_input_dim) and those of its six sizes "
        "(addition_time_embed_dim) and the second text encoder (projection_dim)": (
            unet.projection_class_embeddings_input_dim,
            6 * unet.addition_time_embed_dim + text_encoder_2.projection_dim,
        ),
    }


def _added_features(unet: Any, controlnet: Any) -> dict[str, tuple[Any, Any]]:
    """Both are told the same sizes and pooled text."""
    return {
        f"added features ({name}) of the UNet and the ControlNet": (getattr(unet, name), getattr(controlnet, name))
        for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    }


def _reduction(widths: Sequence[int]) -> int:
    """Each resolution but the last halves the sides of an image."""
    return 2 ** (len(widths) - 1)


def _plain(value: Any) -> Any:
    """JSON's lists and a dataclass's tuples are the same."""
    return list(value) if isinstance(value, tuple | list) else value
