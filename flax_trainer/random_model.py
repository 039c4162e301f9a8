"""Stable Diffusions with random weights, in diffusers' folder layout, for tests and benchmarks: they draw noise.

`python3 -m flax_trainer.random_model sd15 FOLDER` writes one.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_trainer.models import (
    FlaxAutoencoderKL,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxUNet2DConditionModel,
)
from shared.models.byte_tokenizer import VOCABULARY_SIZE, write_byte_tokenizer

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """The `config.json` of every part of a Stable Diffusion."""

    unet: Config
    vae: Config
    text_encoder: Config
    scheduler: Config
    text_encoder_2: Config | None = None  # SDXL's


_SCHEDULER: Config = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


_SDXL_SCHEDULER: Config = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
    "steps_offset": 1,
}
_SDXL_LATENTS: Config = {"scaling_factor": 0.13025, "force_upcast": True}


def _vae(block_out_channels: list[int], layers_per_block: int, norm_num_groups: int) -> Config:
    blocks = len(block_out_channels)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": block_out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": layers_per_block,
        "norm_num_groups": norm_num_groups,
        "scaling_factor": 0.18215,
    }


def _text_encoder(vocab_size: int, hidden_size: int, layers: int, heads: int, intermediate_size: int) -> Config:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }


ARCHITECTURES = {
    # Stable Diffusion 1.5 with the fewest channels and blocks that keep every kind of layer.
    "tiny": Architecture(
        unet={
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [32, 64],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 32,
            "norm_num_groups": 8,
        },
        vae=_vae([8, 16, 16, 16], layers_per_block=1, norm_num_groups=4),
        text_encoder=_text_encoder(VOCABULARY_SIZE, hidden_size=32, layers=2, heads=2, intermediate_size=64),
        scheduler=_SCHEDULER,
    ),
    # The published configuration of stable-diffusion-v1-5.
    "sd15": Architecture(
        unet={
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        vae=_vae([128, 256, 512, 512], layers_per_block=2, norm_num_groups=32),
        text_encoder=_text_encoder(49408, hidden_size=768, layers=12, heads=12, intermediate_size=3072),
        scheduler=_SCHEDULER,
    ),
    # The published configuration of stable-diffusion-2-1.
    "sd21": Architecture(
        unet={
            "sample_size": 96,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "layers_per_block": 2,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        vae=_vae([128, 256, 512, 512], layers_per_block=2, norm_num_groups=32),
        text_encoder=_text_encoder(49408, hidden_size=1024, layers=23, heads=16, intermediate_size=4096)
        | {"hidden_act": "gelu"},
        scheduler=_SCHEDULER,
    ),
    # Stable Diffusion XL with the fewest channels and blocks that keep every kind of layer.
    "tiny_xl": Architecture(
        unet={
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [32, 64],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 1,
            "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 2],
            "cross_attention_dim": 32 + 64,
            "norm_num_groups": 8,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 48 + 6 * 8,
        },
        vae=_vae([8, 16, 16, 16], layers_per_block=1, norm_num_groups=4) | _SDXL_LATENTS,
        text_encoder=_text_encoder(VOCABULARY_SIZE, hidden_size=32, layers=2, heads=2, intermediate_size=64),
        scheduler=_SDXL_SCHEDULER,
        text_encoder_2=_text_encoder(VOCABULARY_SIZE, hidden_size=64, layers=3, heads=4, intermediate_size=128)
        | {"hidden_act": "gelu", "projection_dim": 48},
    ),
    # The published configuration of stable-diffusion-xl-base-1.0.
    "sdxl": Architecture(
        unet={
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "layers_per_block": 2,
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae=_vae([128, 256, 512, 512], layers_per_block=2, norm_num_groups=32) | _SDXL_LATENTS | {"sample_size": 1024},
        text_encoder=_text_encoder(49408, hidden_size=768, layers=12, heads=12, intermediate_size=3072)
        | {"projection_dim": 768},
        scheduler=_SDXL_SCHEDULER,
        text_encoder_2=_text_encoder(49408, hidden_size=1280, layers=32, heads=20, intermediate_size=5120)
        | {"hidden_act": "gelu", "projection_dim": 1280},
    ),
}


def write_random_model(
    architecture: Architecture, folder: Path, *, seed: int = 0, prediction_type: str = "epsilon"
) -> None:
    """Write the model, the same for the same seed; diffusers' `DiffusionPipeline.from_pretrained` loads it."""
    FlaxUNet2DConditionModel.from_config(architecture.unet, seed=seed).save_pretrained(folder / "unet")
    FlaxAutoencoderKL.from_config(architecture.vae, seed=seed).save_pretrained(folder / "vae")
    FlaxCLIPTextModel.from_config(architecture.text_encoder, seed=seed).save_pretrained(folder / "text_encoder")
    write_byte_tokenizer(folder / "tokenizer")
    if architecture.text_encoder_2 is not None:
        text_encoder_2 = FlaxCLIPTextModelWithProjection.from_config(architecture.text_encoder_2, seed=seed)
        text_encoder_2.save_pretrained(folder / "text_encoder_2")
        write_byte_tokenizer(folder / "tokenizer_2")
    scheduler = architecture.scheduler | {"prediction_type": prediction_type}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", _model_index(architecture))


def _model_index(architecture: Architecture) -> Config:
    index: Config = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", architecture.scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if architecture.text_encoder_2 is None:
        return index | {"feature_extractor": [None, None], "safety_checker": [None, None]}
    return index | {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }


def _write_json(path: Path, content: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=ARCHITECTURES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_random_model(ARCHITECTURES[arguments.name], arguments.folder)
