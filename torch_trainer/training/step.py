"""The training step: loss, gradients and the optimizer's move, from a batch in which everything random is drawn.

Axes: A microbatches (gradient accumulation), B batch of this process, H W latent height and width, C channels,
L tokens, D features.
Batches come in NHWC, as `shared.data.batches` makes them; PyTorch's modules take BCHW.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.profiler import record_function

from shared.config import TrainConfig
from shared.data.batches import Batch
from shared.diffusion.loss_weighting import loss_weights
from shared.diffusion.schedule import NoiseSchedule, add_noise, gather, training_target
from torch_trainer.base_models import BaseModels
from torch_trainer.training.weight_average import WeightAverage

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """The loss's constants, on the device. Tables are float32 [num_train_timesteps]."""

    schedule: NoiseSchedule
    signal: torch.Tensor
    sigma: torch.Tensor
    loss_weights: torch.Tensor

    @classmethod
    def create(cls, schedule: NoiseSchedule, snr_gamma: float | None, device: torch.device) -> "Objective":
        """`snr_gamma` is `--snr_gamma`: None weighs all timesteps the same."""
        weights = loss_weights(schedule, snr_gamma)
        tables = (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod, weights)
        return cls(schedule, *(torch.from_numpy(table).to(device) for table in tables))


def to_device(batch: Batch, device: torch.device) -> Tensors:
    """Arrays that begin with [B] as tensors; images and noise as BCHW views of the same memory order."""
    with record_function("host_to_device"):
        tensors = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in batch.items()}
    return {name: tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor for name, tensor in tensors.items()}


def normalise_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] → float32 [-1, 1], the VAE's range."""
    return pixel_values.float() / 127.5 - 1.0


def normalise_condition(conditioning_pixel_values: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] → float32 [0, 1], the ControlNet's range."""
    return conditioning_pixel_values.float() / 255.0


@torch.no_grad()
def encode_batch(models: BaseModels, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """What the frozen encoders make of a batch: (latents float32 [B,C,H,W], encoder_hidden_states [B,L,D])."""
    with record_function("vae"):
        posterior = models.vae.encode(normalise_pixels(batch["pixel_values"]).to(models.dtype)).latent_dist
    sample_BCHW = posterior.mean.float() + posterior.std.float() * batch["vae_noise"]
    with record_function("text_encoder"):
        hidden_states_BLD = models.text_encoder(batch["input_ids"].long()).last_hidden_state
    return sample_BCHW * models.vae.config.scaling_factor, hidden_states_BLD


def per_sample_losses(models: BaseModels, batch: Tensors, objective: Objective) -> torch.Tensor:
    """Mean squared error of the ControlNet-guided prediction, float32 [B], unweighted (Ho et al. 2020, eq. 14)."""
    latents_BCHW, hidden_states_BLD = encode_batch(models, batch)
    timesteps_B = batch["timesteps"].long()
    signal_B111, sigma_B111 = gather(objective.signal, timesteps_B), gather(objective.sigma, timesteps_B)
    noisy_BCHW = add_noise(latents_BCHW, batch["noise"], signal_B111, sigma_B111).to(models.dtype)
    target_BCHW = training_target(
        objective.schedule.prediction_type, latents_BCHW, batch["noise"], signal_B111, sigma_B111
    )
    condition_BCHW = normalise_condition(batch["conditioning_pixel_values"]).to(models.dtype)
    prediction_BCHW = predict(models, noisy_BCHW, timesteps_B, hidden_states_BLD, condition_BCHW)
    return (prediction_BCHW - target_BCHW).square().mean(dim=(1, 2, 3))


def predict(
    models: BaseModels,
    sample_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
    encoder_hidden_states_BLD: torch.Tensor,
    controlnet_cond_BCHW: torch.Tensor,
) -> torch.Tensor:
    """The UNet's output under the ControlNet's control, float32. Inputs are in the compute dtype."""
    with record_function("controlnet"):
        down_residuals, mid_residual = models.controlnet(
            sample_BCHW,
            timesteps_B,
            encoder_hidden_states=encoder_hidden_states_BLD,
            controlnet_cond=controlnet_cond_BCHW,
            return_dict=False,
        )
    with record_function("unet"):
        (prediction_BCHW,) = models.unet(
            sample_BCHW,
            timesteps_B,
            encoder_hidden_states=encoder_hidden_states_BLD,
            down_block_additional_residuals=tuple(residual.to(models.dtype) for residual in down_residuals),
            mid_block_additional_residual=mid_residual.to(models.dtype),
            return_dict=False,
        )
    return prediction_BCHW.float()


@dataclass
class TrainStep:
    """`step(batch, learning_rate) → (loss, grad_norm)`, both over all processes, the norm before clipping.

    Where one of them is not finite, nothing is changed. (DeepSpeed moves in the backward pass, by the same rules.)
    """

    accelerator: Accelerator
    models: BaseModels
    objective: Objective
    optimizer: Any
    config: TrainConfig
    average: WeightAverage | None = None

    @property
    def loss_scale(self) -> float | None:
        """Of the next step; None without fp16's loss scaling."""
        if self.accelerator.mixed_precision != "fp16":
            return None
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return float(self.optimizer.optimizer.loss_scale)
        assert self.accelerator.scaler is not None
        return float(self.accelerator.scaler.get_scale())

    def __call__(self, batch: Batch, learning_rate: float) -> tuple[float, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        while True:
            loss, grad_norm = self._gradients(batch)
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            scale_too_high = math.isfinite(loss) and not finite and (self.loss_scale or 1.0) > 1.0
            if finite or scale_too_high:
                with record_function("optimizer"):
                    self.optimizer.step()  # with gradients that overflowed, it only lowers the loss scale
            self.optimizer.zero_grad(set_to_none=self.config.set_grads_to_none)
            if finite and self.average is not None:
                self.average.update()
            if not scale_too_high:
                return loss, grad_norm
            # The batch belongs to this step: it is taken again with the lower scale, so that no sample is lost and
            # the count of steps stays that of the optimizer's moves.

    def _gradients(self, batch: Batch) -> tuple[float, float]:
        accelerator = self.accelerator
        microbatches = len(batch["timesteps"])
        total = torch.zeros((), device=accelerator.device)
        for index in range(microbatches):
            microbatch = to_device({name: array[index] for name, array in batch.items()}, accelerator.device)
            with accelerator.accumulate(*self.models.trained):
                losses_B = per_sample_losses(self.models, microbatch, self.objective)
                loss = (self.objective.loss_weights[microbatch["timesteps"].long()] * losses_B).mean()
                accelerator.backward(loss)
            total += loss.detach() / microbatches
        parameters = [param for model in self.models.trained for param in model.parameters()]
        with record_function("optimizer"):
            grad_norm = accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
        return accelerator.reduce(total, reduction="mean").item(), float(grad_norm)
