"""CLIP's text encoders: ViT-L of SD 1.x and SDXL, OpenCLIP-H of SD 2.x, OpenCLIP-bigG of SDXL.

Axes: B batch, L tokens, N heads, D features (per head where N stands before it), P projected features.

Reference: Radford et al. 2021 (arXiv:2103.00020, section 2.4); transformers' `CLIPTextModel`, whose published files and
parameter names are kept.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from flax_trainer.models.kernels.attention import plain_attention
from flax_trainer.models.layers.basic import Embedding, LayerNorm, Linear
from flax_trainer.models.pretrained import PretrainedModel
from shared.models.configs import CLIPTextConfig
from shared.models.weight_files import TRANSFORMERS
from shared.user_errors import UserError

LEGACY_EOS_TOKEN_ID = 2


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · sigmoid(1.702 x), OpenAI CLIP's approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, of OpenCLIP."""
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


class FlaxCLIPTextModel(PretrainedModel):
    """Token ids to one vector per token and one per text. Computes in the dtype of its parameters."""

    config_class = CLIPTextConfig
    weight_names = TRANSFORMERS
    embedding_std = 0.02
    identity: ClassVar[dict[str, Any]] = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config)
        self.text_model = CLIPTextTransformer(config)

    def __call__(self, input_ids_BL: jax.Array, penultimate: bool = False) -> tuple[jax.Array, jax.Array]:
        """Encode tokens.

        Args:
            input_ids_BL: integers in [0, vocab_size), at most `max_position_embeddings` a text, each with an end token.
            penultimate: give what enters the last layer, without the final normalisation (transformers'
                `hidden_states[-2]`, which SDXL reads), instead of the normalised output of the last layer.

        Returns:
            hidden states [B, L, hidden_size], and the normalised last hidden state at the end token
            [B, hidden_size].

        Raises:
            UserError: the texts are longer than `max_position_embeddings`.
        """
        return self.text_model(input_ids_BL, penultimate)


class FlaxCLIPTextModelWithProjection(FlaxCLIPTextModel):
    """`FlaxCLIPTextModel` whose pooled vector is projected to CLIP's joint space, [B, projection_dim]."""

    identity: ClassVar[dict[str, Any]] = {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
    }

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, use_bias=False)

    def __call__(self, input_ids_BL: jax.Array, penultimate: bool = False) -> tuple[jax.Array, jax.Array]:
        """As `FlaxCLIPTextModel`, with the pooled vector projected."""
        hidden_states_BLD, pooled_BD = self.text_model(input_ids_BL, penultimate)
        return hidden_states_BLD, self.text_projection(pooled_BD)


class CLIPTextTransformer(nnx.Module):
    """Embeddings, causal transformer, final normalisation and pooling."""

    def __init__(self, config: CLIPTextConfig):
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.eos_token_id = config.eos_token_id

    def __call__(self, input_ids_BL: jax.Array, penultimate: bool) -> tuple[jax.Array, jax.Array]:
        before_last_BLD, last_BLD = self.encoder(self.embeddings(input_ids_BL))
        normalised_BLD = self.final_layer_norm(last_BLD)
        end_B = end_positions(input_ids_BL, self.eos_token_id)
        pooled_BD = jnp.take_along_axis(normalised_BLD, end_B[:, None, None], axis=1)[:, 0]
        return (before_last_BLD if penultimate else normalised_BLD), pooled_BD


class CLIPTextEmbeddings(nnx.Module):
    """Token and learned position embeddings, added."""

    def __init__(self, config: CLIPTextConfig):
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)
        self.max_length = config.max_position_embeddings

    def __call__(self, input_ids_BL: jax.Array) -> jax.Array:
        length = input_ids_BL.shape[-1]
        if length > self.max_length:
            raise UserError(
                f"The texts have {length} tokens and this encoder takes at most {self.max_length}: truncate them when "
                "tokenising."
            )
        return self.token_embedding(input_ids_BL) + self.position_embedding(jnp.arange(length))


class CLIPEncoder(nnx.Module):
    """The layers. Returns what enters the last one and what leaves it."""

    def __init__(self, config: CLIPTextConfig):
        self.layers = nnx.List(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def __call__(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        *earlier, last = self.layers
        for layer in earlier:
            x_BLD = layer(x_BLD)
        return x_BLD, last(x_BLD)


class CLIPEncoderLayer(nnx.Module):
    """Causal self-attention and a two-layer perceptron, each normalised before and with a residual around it."""

    def __init__(self, config: CLIPTextConfig):
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        x_BLD = x_BLD + self.self_attn(self.layer_norm1(x_BLD))
        return x_BLD + self.mlp(self.layer_norm2(x_BLD))


class CLIPAttention(nnx.Module):
    """Multi-head attention in which a token sees itself and what stands before it; softmax in float32."""

    def __init__(self, config: CLIPTextConfig):
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)
        self.heads = config.num_attention_heads

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        batch, length, features = x_BLD.shape
        query, key, value = (
            project(x_BLD).reshape(batch, length, self.heads, features // self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y_BLND = plain_attention(query, key, value, is_causal=True)
        return self.out_proj(y_BLND.reshape(x_BLD.shape))


class CLIPMLP(nnx.Module):
    """Widen, activate, narrow."""

    def __init__(self, config: CLIPTextConfig):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self.activation = config.hidden_act

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x_BLD)))


def end_positions(input_ids_BL: jax.Array, eos_token_id: int) -> jax.Array:
    """Index of each text's first end token, int32 [B].

    Configurations written before transformers 4.31 (SD 1.5, 2.1 and SDXL among them) say 2, which is wrong: there the
    end is the largest id of the text, as in the original CLIP (transformers' `CLIPTextModel.forward`).
    """
    if eos_token_id == LEGACY_EOS_TOKEN_ID:
        return jnp.argmax(input_ids_BL, axis=-1)
    return jnp.argmax(input_ids_BL == eos_token_id, axis=-1)
