"""diffusers' torch UNet and ControlNet, small and random, beside this project's models with the same weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from flax_trainer.models.controlnet import FlaxControlNetModel
from flax_trainer.models.layers.compute import Compute
from flax_trainer.models.params import ModelDef, Params, from_torch_layout, split
from flax_trainer.models.unet import FlaxUNet2DConditionModel

SD1 = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "layers_per_block": 2,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD2 = SD1 | {
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "addition_embed_type_num_heads": 64,
    "conv_in_kernel": 3,
    "class_embed_type": None,
    "time_embedding_type": "positional",
}
FULL_SIZE = {"sd1.5": SD1, "sd2.1": SD2, "sdxl": SDXL}

TINY_SD1 = SD1 | {
    "block_out_channels": [16, 32, 32],
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
TINY_SD2 = SD2 | {
    "block_out_channels": [16, 32],
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 24,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
TINY_SDXL = SDXL | {
    "block_out_channels": [16, 32, 32],
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "attention_head_dim": [1, 2, 4],
    "cross_attention_dim": 24,
    "transformer_layers_per_block": [1, 1, 2],
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}
TINY = {"sd1": TINY_SD1, "sd2": TINY_SD2, "sdxl": TINY_SDXL}
CONDITIONING_WIDTHS = (4, 8, 8, 12)

TorchModel = Any  # diffusers' classes carry no types


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter, zero convolutions and norms included, values that keep activations near unit size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise + parameter.detach().mean().round())


def torch_unet(config: dict[str, Any], seed: int = 0) -> TorchModel:
    model = UNet2DConditionModel.from_config(config).eval()
    randomise(model, seed)
    return model


def torch_controlnet(unet: TorchModel, seed: int = 1, **overrides: Any) -> TorchModel:
    """Random in every parameter: not a copy of the UNet, and without its zeros."""
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=CONDITIONING_WIDTHS)
    model = ControlNetModel.from_config({**model.config, **overrides}).eval()
    randomise(model, seed)
    return model


def json_config(model: TorchModel) -> dict[str, Any]:
    """The `config.json` that diffusers would write."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in model.config.items()}


def flax_copy(model: TorchModel, *, for_tpu: bool = False) -> tuple[ModelDef[Any], Params]:
    """This project's model of the same architecture, with the same weights."""
    cls = FlaxUNet2DConditionModel if isinstance(model, UNet2DConditionModel) else FlaxControlNetModel
    definition, _ = split(cls.abstract(json_config(model), compute=Compute(tpu_convolutions=for_tpu)))
    return definition, params_of(model, definition.layouts)


def params_of(model: torch.nn.Module, layouts: dict[str, str]) -> Params:
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    return {name: jnp.asarray(from_torch_layout(value, layouts[name])) for name, value in state.items()}


def make_inputs(config: dict[str, Any], height: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Latents BHWC, timesteps, text and condition of a batch of two; SDXL's conditions where the model has them."""
    rng = np.random.default_rng(seed)
    inputs = {
        "sample": rng.standard_normal((2, height, width, 4), np.float32),
        "timesteps": np.array([3, 977], np.int32),
        "text": rng.standard_normal((2, 7, config["cross_attention_dim"]), np.float32),
        "condition": rng.random((2, 8 * height, 8 * width, 3), np.float32),
    }
    if config.get("addition_embed_type") == "text_time":
        inputs["text_embeds"] = rng.standard_normal((2, 20), np.float32)
        inputs["time_ids"] = np.array([[1024, 1000, 0, 8, 1024, 1024], [512, 768, 16, 0, 1024, 768]], np.float32)
    return inputs


def added_conditions(inputs: dict[str, Any]) -> dict[str, Any] | None:
    return {name: inputs[name] for name in ("text_embeds", "time_ids")} if "time_ids" in inputs else None


def to_torch(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same numbers, images as BCHW."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    return {name: t.permute(0, 3, 1, 2) if t.ndim == 4 else t for name, t in tensors.items()}


def bhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def relative_difference(given: jax.Array | np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference in units of the largest expected value."""
    assert given.shape == expected.shape, (given.shape, expected.shape)
    return float(np.abs(np.asarray(given) - expected).max() / np.abs(expected).max())
