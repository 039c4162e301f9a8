"""What a training step of the PyTorch backend asks of a GPU's memory, counted without a GPU and without weights.

    python3 -m benchmarks.torch_memory --architecture sdxl --resolution 1024 [--images 1] [--cached]
        [--gradient_checkpointing] [--adam_bits 8]

The step of `train_torch.py --mixed_precision bf16` runs forward and backward on tensors that have shapes and no memory
(PyTorch's FakeTensorMode), and what is alive is added up. Attention keeps what the flash kernels keep. Not counted are the workspaces of cuDNN and cuBLAS, what the allocator loses between blocks (PyTorch reserves some percent
more than it uses), and the CUDA context (about half a GiB).
"""

import argparse
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from flax_trainer.random_model import ARCHITECTURES, Architecture
from shared.diffusion.schedule import NoiseSchedule
from shared.models.configs import AutoencoderKLConfig, UNet2DConditionConfig
from shared.models.xl import SIZES, vae_in_float32
from torch_trainer.base_models import BaseModels, Prompt
from torch_trainer.training import step as training_step
from torch_trainer.training.precision import compute_in_dtype_of_input
from torch_trainer.training.step import Objective, per_sample_losses

GIB = 2**30
TOKENS = 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sd15")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--cached", action="store_true", help="latents and text embeddings are there already")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--adam_bits", type=int, choices=[8, 32], default=32, help="8: --use_8bit_adam")
    arguments = parser.parse_args()
    schedule = NoiseSchedule.from_config(ARCHITECTURES[arguments.architecture].scheduler)
    with FakeTensorMode(allow_non_fake_inputs=True):
        models = without_weights(ARCHITECTURES[arguments.architecture], checkpointing=arguments.gradient_checkpointing)
        peak = peak_of_step(models, schedule, arguments)
    trained = bytes_of(models.controlnet)
    optimizer = trained * 2 * arguments.adam_bits // 32
    print(f"trained            {trained / GIB:7.2f} GiB   float32")
    print(f"optimizer          {optimizer / GIB:7.2f} GiB")
    frozen = sum(map(bytes_of, frozen_models(models, cached=arguments.cached)))
    print(f"frozen models      {frozen / GIB:7.2f} GiB")
    print(f"gradients and what is alive with them at the most {peak / GIB:7.2f} GiB")
    print(f"in all             {(trained + optimizer + frozen + peak) / GIB:7.2f} GiB   (counted, not measured)")


def without_weights(parts: Architecture, *, checkpointing: bool) -> BaseModels:
    """As `load_base_models` and `place` leave them."""
    upcast = vae_in_float32(UNet2DConditionConfig.from_dict(parts.unet), AutoencoderKLConfig.from_dict(parts.vae))
    with _parameters_in(torch.float32):
        controlnet = ControlNetModel.from_unet(
            UNet2DConditionModel(**_fields(parts.unet)), load_weights_from_unet=False
        )
    with _parameters_in(torch.float32 if upcast else torch.bfloat16):
        vae = AutoencoderKL(**_fields(parts.vae))
    text_encoder_2 = None
    with _parameters_in(torch.bfloat16):
        unet = UNet2DConditionModel(**_fields(parts.unet))
        text_encoder = CLIPTextModel(CLIPTextConfig(**_fields(parts.text_encoder)))
        if parts.text_encoder_2 is not None:
            text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**_fields(parts.text_encoder_2)))
    for model in filter(None, (unet, vae, text_encoder, text_encoder_2)):
        model.requires_grad_(False).eval()
    compute_in_dtype_of_input(controlnet.train())
    if checkpointing:
        controlnet.enable_gradient_checkpointing()
        unet.enable_gradient_checkpointing()
    return BaseModels(
        controlnet, unet, vae, text_encoder, torch.bfloat16, sd_unlocked=False, text_encoder_2=text_encoder_2
    )


@contextmanager
def _parameters_in(dtype: torch.dtype) -> Iterator[None]:
    """Of the models that are made meanwhile; those without memory cannot be converted."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def peak_of_step(models: BaseModels, schedule: NoiseSchedule, arguments: argparse.Namespace) -> int:
    """Bytes of gradients, activations and temporary results that are alive at once."""
    batch = _batch(models, arguments)
    if arguments.cached:
        latents = torch.empty_like(batch["noise"]), _prompt(models, batch)
        training_step.encode_batch = lambda models, batch: latents  # as a batch that brings them would
    objective = Objective.create(schedule, None, torch.device("cpu"))
    with LiveBytes([models.controlnet, *frozen_models(models, cached=False)]) as live:
        per_sample_losses(models, batch, objective).mean().backward()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Adds up the memory of all tensors that are made while it is active, as long as they live.

    Views of the models' own are none of them.
    """

    def __init__(self, models: list[Any]) -> None:
        super().__init__()
        self.peak, self._now = 0, 0
        own = [tensor.untyped_storage() for model in models for tensor in (*model.parameters(), *model.buffers())]
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet(own)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, made)
        return made

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self._now -= size


def frozen_models(models: BaseModels, *, cached: bool) -> list[Any]:
    """Those that the device holds."""
    encoders = [] if cached else [models.vae, models.text_encoder, models.text_encoder_2]
    return [model for model in (models.unet, *encoders) if model is not None]


def bytes_of(model: Any) -> int:
    return sum(param.numel() * param.element_size() for param in model.parameters())


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _batch(models: BaseModels, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """[B, …], of the right shapes."""
    count, side = arguments.images, arguments.resolution
    height, width, channels = models.latent_shape(side)
    batch = {
        "pixel_values": torch.zeros((count, 3, side, side), dtype=torch.uint8),
        "conditioning_pixel_values": torch.zeros((count, 3, side, side), dtype=torch.uint8),
        "input_ids": torch.zeros((count, TOKENS), dtype=torch.int32),
        "vae_noise": torch.zeros((count, channels, height, width)),
        "noise": torch.zeros((count, channels, height, width)),
        "timesteps": torch.zeros(count, dtype=torch.int32),
    }
    if models.text_encoder_2 is not None:
        batch |= {"input_ids_2": batch["input_ids"], "time_ids": torch.zeros((count, SIZES))}
    return batch


def _prompt(models: BaseModels, batch: dict[str, torch.Tensor]) -> Prompt:
    width, count = models.unet.config.cross_attention_dim, len(batch["timesteps"])
    hidden_states_BLD = torch.zeros((count, TOKENS, width), dtype=models.dtype)
    if models.text_encoder_2 is None:
        return Prompt(hidden_states_BLD)
    pooled_BP = torch.zeros((count, models.text_encoder_2.config.projection_dim), dtype=models.dtype)
    return Prompt(hidden_states_BLD, {"text_embeds": pooled_BP, "time_ids": batch["time_ids"]})


if __name__ == "__main__":
    main()
