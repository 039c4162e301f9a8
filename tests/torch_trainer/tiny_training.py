"""A tiny ControlNet in training, and the same training written with diffusers' and PyTorch's own parts."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers.training_utils import compute_snr
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from shared.config import TrainConfig
from shared.diffusion.schedule import NoiseSchedule
from torch_trainer.base_models import BaseModels, load_base_models
from torch_trainer.distributed.accelerator import COMPUTE_DTYPES, make_accelerator
from torch_trainer.distributed.placement import place
from torch_trainer.distributed.trainable_state import TrainableState
from torch_trainer.training.step import Objective, TrainStep

ROOT = Path(__file__).resolve().parents[2]
Batch = dict[str, np.ndarray]
Changes = dict[str, Any]


def configuration(base_model: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(pretrained_model_name_or_path=str(base_model), **({"mixed_precision": "no"} | changes))


def schedule_of(base_model: Path, changes: Changes | None = None) -> NoiseSchedule:
    text = (base_model / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    return NoiseSchedule.from_config(json.loads(text) | (changes or {}))


def batch_of(count: int, seed: int = 0, slices: int = 1, *, xl: bool = False) -> Batch:
    """A batch of noise, [slices, count / slices, ...]: the same rows whatever the slices."""
    rng = np.random.default_rng(seed)
    arrays = {
        "pixel_values": rng.integers(0, 256, (count, 64, 64, 3), np.uint8),
        "conditioning_pixel_values": rng.integers(0, 256, (count, 64, 64, 3), np.uint8),
        "input_ids": rng.integers(0, 500, (count, 77), np.int32),
        "vae_noise": rng.standard_normal((count, 8, 8, 4), np.float32),
        "noise": rng.standard_normal((count, 8, 8, 4), np.float32),
        "timesteps": rng.integers(0, 1000, count, np.int32),
    }
    if xl:  # texts that end in different places, images of different sizes
        arrays["input_ids_2"] = rng.integers(0, 500, (count, 77), np.int32)
        arrays["input_ids_2"][np.arange(count), rng.integers(5, 77, count)] = 513
        arrays["time_ids"] = rng.integers(0, 1024, (count, 6)).astype(np.float32)
    return {name: value.reshape(slices, -1, *value.shape[1:]) for name, value in arrays.items()}


def slice_of(batch: Batch, index: int) -> Batch:
    """An accumulation slice, [rows, ...]."""
    return {name: array[index] for name, array in batch.items()}


def awaken(controlnet: torch.nn.Module, seed: int = 0) -> None:
    """Move every weight a little: as it starts, the zero convolutions keep all other gradients at zero."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in filter(lambda param: param.requires_grad, controlnet.parameters()):
            param += 0.02 * torch.randn(param.shape, generator=random)


@dataclass
class Training:
    """Everything that a step needs, made as `torch_trainer.train` makes it."""

    config: TrainConfig
    accelerator: Accelerator
    models: BaseModels
    optimizer: Any
    state: TrainableState
    train_step: TrainStep

    def step(self, batch: Batch, learning_rate: float) -> tuple[float, float]:
        """Take one, and wait for its loss and gradient norm."""
        return self.train_step(batch, learning_rate).read()[:2]

    @property
    def controlnet(self) -> Any:
        return self.accelerator.unwrap_model(self.models.controlnet)

    def gradients(self) -> dict[str, torch.Tensor]:
        """After a first step that clipped nothing: AdamW's first moment is then a tenth of the gradient."""
        return {name: kinds["exp_avg"] * 10 for name, kinds in self.state.tensors().optimizer.items()}


def forget_accelerate_state() -> None:
    """accelerate keeps devices, precision and accumulation in class attributes, which the first to come decides."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def training_of(
    base_model: Path, *, awake: bool = True, scheduler: Changes | None = None, **config_changes: Any
) -> Training:
    """A fresh one. An older one can only be looked at from then on."""
    forget_accelerate_state()
    config = configuration(base_model, **config_changes)
    accelerator = make_accelerator(config)
    models = load_base_models(config, COMPUTE_DTYPES[accelerator.mixed_precision])
    if awake:
        awaken(models.controlnet)
    optimizer, state, average = place(config, accelerator, models)
    objective = Objective.create(schedule_of(base_model, scheduler), config.snr_gamma, accelerator.device)
    step = TrainStep(accelerator, models, objective, optimizer, config, average)
    return Training(config, accelerator, models, optimizer, state, step)


class DiffusersTraining:
    """The loop of diffusers' ControlNet guide, with noise and timesteps from the batch."""

    def __init__(self, base_model: Path, controlnet: torch.nn.Module, scheduler: Changes | None = None):
        self.vae = diffusers.AutoencoderKL.from_pretrained(base_model / "vae")
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(base_model / "unet")
        self.text_encoder = CLIPTextModel.from_pretrained(base_model / "text_encoder")
        self.text_encoder_2 = None
        if (base_model / "text_encoder_2").exists():
            self.text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(base_model / "text_encoder_2")
        self.scheduler = diffusers.DDPMScheduler.from_pretrained(base_model / "scheduler", **(scheduler or {}))
        self.controlnet = copy.deepcopy(controlnet)
        self.unet.requires_grad_(False)

    def loss(self, slice_: Batch, *, controlled: bool = True, snr_gamma: float | None = None) -> torch.Tensor:
        """Of one accumulation slice, [rows, ...]."""

        def channels_first(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).movedim(-1, 1).float()

        with torch.no_grad():
            posterior = self.vae.encode(channels_first(slice_["pixel_values"]) / 127.5 - 1).latent_dist
            latents = posterior.mean + posterior.std * channels_first(slice_["vae_noise"])
            latents = latents * self.vae.config.scaling_factor
            text, added = self.encoded_captions(slice_)
        noise, timesteps = channels_first(slice_["noise"]), torch.from_numpy(slice_["timesteps"]).long()
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        residuals = {}
        if controlled:
            condition = channels_first(slice_["conditioning_pixel_values"]) / 255
            down, mid = self.controlnet(noisy, timesteps, text, condition, added_cond_kwargs=added, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        prediction = self.unet(noisy, timesteps, text, added_cond_kwargs=added, **residuals).sample
        prediction_type = self.scheduler.config.prediction_type
        target = {
            "epsilon": noise,
            "sample": latents,
            "v_prediction": self.scheduler.get_velocity(latents, noise, timesteps),
        }[prediction_type]
        if snr_gamma is None:
            return F.mse_loss(prediction, target)
        # https://github.com/huggingface/diffusers/blob/main/examples/text_to_image/train_text_to_image.py
        snr = compute_snr(self.scheduler, timesteps)
        weights = torch.stack([snr, snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        weights = weights / {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[prediction_type]
        return (F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3)) * weights).mean()

    def encoded_captions(self, slice_: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """As the pipelines' `encode_prompt`, and `added_cond_kwargs` as train_controlnet_sdxl.py makes them."""
        ids = torch.from_numpy(slice_["input_ids"]).long()
        if self.text_encoder_2 is None:
            return self.text_encoder(ids)[0], None
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(torch.from_numpy(slice_["input_ids_2"]).long(), output_hidden_states=True)
        text = torch.concat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return text, {"text_embeds": second[0], "time_ids": torch.from_numpy(slice_["time_ids"])}

    def train(self, batches: Iterator[tuple[Batch, float]], config: TrainConfig) -> Iterator[tuple[float, float]]:
        """Yields (loss, gradient norm) of each step on a (batch, learning rate)."""
        optimizer = torch.optim.AdamW(
            self.controlnet.parameters(),
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
        )
        for batch, learning_rate in batches:
            slices = len(batch["timesteps"])
            total = 0.0
            for index in range(slices):
                loss = self.loss(slice_of(batch, index), snr_gamma=config.snr_gamma)
                (loss / slices).backward()
                total += loss.item() / slices
            norm = torch.nn.utils.clip_grad_norm_(self.controlnet.parameters(), config.max_grad_norm)
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
            yield total, norm.item()


def relative_difference(given: Any, expected: Any) -> float:
    given, expected = np.asarray(given), np.asarray(expected)
    return float(np.linalg.norm(given - expected) / max(np.linalg.norm(expected), 1e-12))
