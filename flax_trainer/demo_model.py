"""A very small Stable Diffusion with random weights, in diffusers' folder layout: enough to run a whole training.

Its architecture is Stable Diffusion 1.5's with fewer channels; what it draws is noise.
"""

import json
from pathlib import Path
from typing import Any

from flax_trainer.models import FlaxAutoencoderKL, FlaxCLIPTextModel, FlaxUNet2DConditionModel
from shared.byte_tokenizer import VOCABULARY_SIZE, write_byte_tokenizer

_TEXT_WIDTH = 32

_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": _TEXT_WIDTH,
    "norm_num_groups": 8,
}
_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.18215,
}
_TEXT_ENCODER = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": _TEXT_WIDTH,
    "intermediate_size": 2 * _TEXT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": VOCABULARY_SIZE - 2,
    "eos_token_id": VOCABULARY_SIZE - 1,
    "pad_token_id": VOCABULARY_SIZE - 1,
}
_SCHEDULER = {
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
_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_demo_model(folder: Path, *, seed: int = 0, prediction_type: str = "epsilon") -> None:
    """Write the model, the same for the same seed; diffusers' `StableDiffusionPipeline.from_pretrained` loads it."""
    FlaxUNet2DConditionModel.from_config(_UNET, seed=seed).save_pretrained(folder / "unet")
    FlaxAutoencoderKL.from_config(_VAE, seed=seed).save_pretrained(folder / "vae")
    FlaxCLIPTextModel.from_config(_TEXT_ENCODER, seed=seed).save_pretrained(folder / "text_encoder")
    write_byte_tokenizer(folder / "tokenizer")
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER | {"prediction_type": prediction_type})
    _write_json(folder / "model_index.json", _MODEL_INDEX)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
