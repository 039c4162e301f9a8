"""The training step: loss, gradients and the optimizer's move, from a batch in which everything random is drawn.

Axes: A microbatches (gradient accumulation), B batch of this process, H W latent height and width, C channels,
L tokens, D features.
Batches come in NHWC, as `shared.data.batches` makes them; PyTorch's modules take BCHW.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from shared.config import TrainConfig
from shared.data.batches import Batch
from shared.data.tokenization import ENCODED_TEXT
from shared.diffusion.control import grades
from shared.diffusion.loss_weighting import loss_weights
from shared.diffusion.schedule import NoiseSchedule, add_noise, gather, training_target
from shared.run.requests import NO_REQUESTS, Requests
from torch_trainer.base_models import BaseModels, Prompt, TextEncoders
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
        tensors = {name: _sent(torch.from_numpy(array), device) for name, array in batch.items()}
    return {name: tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor for name, tensor in tensors.items()}


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On its way to the device. Only from pinned memory a GPU copies while the host goes on."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def normalise_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] → float32 [-1, 1], the VAE's range."""
    return pixel_values.float() / 127.5 - 1.0


def normalise_condition(conditioning_pixel_values: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] → float32 [0, 1], the ControlNet's range."""
    return conditioning_pixel_values.float() / 255.0


@torch.no_grad()
def encode_batch(models: BaseModels, batch: Tensors) -> tuple[torch.Tensor, Prompt]:
    """What the frozen encoders make of a batch: (latents float32 [B,C,H,W], encoded captions).

    A batch for SDXL has captions for both encoders, `input_ids` and `input_ids_2` int32 [B,L], and `time_ids` float32
    [B,6]: original height and width, top and left edge of the crop, target height and width.

    Images may be encoded already, `latent_mean`, `latent_std` [B,C,H,W] for `pixel_values` (of dtype uint16: the bits
    of bfloat16), and so may captions (see `encode_captions`).
    """
    if "latent_mean" in batch:
        mean_BCHW, std_BCHW = (_with_bfloat16(batch[name]) for name in ("latent_mean", "latent_std"))
    else:
        mean_BCHW, std_BCHW = encode_images(models, batch["pixel_values"])
    sample_BCHW = mean_BCHW.float() + std_BCHW.float() * batch["vae_noise"]
    return sample_BCHW * models.vae.config.scaling_factor, encode_captions(models, batch)


def encode_images(models: BaseModels, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [B,C,H,W] of the latents of images uint8 [B,3,R,R], in the dtype of the VAE."""
    pixels_BCHW = models.as_vae_input(normalise_pixels(pixel_values))
    with record_function("vae"):
        posterior = models.vae.encode(pixels_BCHW).latent_dist
    return posterior.mean, posterior.std


def encode_captions(models: BaseModels, prompt_inputs: Tensors) -> Prompt:
    """What the text encoders make of `shared.data.tokenization.PromptInputs`.

    Captions that are encoded already come as `prompt_embeds` [B,L,D] in place of `input_ids`, and for SDXL as
    `pooled_prompt_embeds` [B,P]; those of dtype uint16 are the bits of bfloat16.
    """
    if "prompt_embeds" in prompt_inputs:
        encoded = {name: _with_bfloat16(prompt_inputs[name]) for name in ENCODED_TEXT if name in prompt_inputs}
    else:
        encoded = encode_tokens(TextEncoders(models.text_encoder, models.text_encoder_2), prompt_inputs)
    added = None
    if "pooled_prompt_embeds" in encoded:
        added = {"text_embeds": encoded["pooled_prompt_embeds"], "time_ids": prompt_inputs["time_ids"]}
    return Prompt(encoded["prompt_embeds"], added)


@torch.no_grad()
def encode_tokens(text_encoders: TextEncoders, token_ids: Tensors) -> Tensors:
    """`prompt_embeds` [B,L,D] and, for SDXL, `pooled_prompt_embeds` [B,P] of `input_ids` and `input_ids_2` [B,L]."""
    with record_function("text_encoder"):
        if text_encoders.text_encoder_2 is None:
            return {"prompt_embeds": text_encoders.text_encoder(token_ids["input_ids"].long()).last_hidden_state}
        # Podell et al. 2023 (SDXL), section 2.1: both encoders' penultimate states, the second's pooled text.
        first = text_encoders.text_encoder(token_ids["input_ids"].long(), output_hidden_states=True)
        second = text_encoders.text_encoder_2(token_ids["input_ids_2"].long(), output_hidden_states=True)
    hidden_states_BLD = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1)
    return {"prompt_embeds": hidden_states_BLD, "pooled_prompt_embeds": second.text_embeds}


def _with_bfloat16(encoded: torch.Tensor) -> torch.Tensor:
    return encoded.view(torch.bfloat16) if encoded.dtype == torch.uint16 else encoded


def per_sample_losses(models: BaseModels, batch: Tensors, objective: Objective) -> torch.Tensor:
    """Mean squared error of the ControlNet-guided prediction, float32 [B], unweighted (Ho et al. 2020, eq. 14)."""
    latents_BCHW, prompt = encode_batch(models, batch)
    timesteps_B = batch["timesteps"].long()
    signal_B111, sigma_B111 = gather(objective.signal, timesteps_B), gather(objective.sigma, timesteps_B)
    noisy_BCHW = add_noise(latents_BCHW, batch["noise"], signal_B111, sigma_B111)
    target_BCHW = training_target(
        objective.schedule.prediction_type, latents_BCHW, batch["noise"], signal_B111, sigma_B111
    )
    condition_BCHW = normalise_condition(batch["conditioning_pixel_values"])
    prediction_BCHW = predict(models, noisy_BCHW, timesteps_B, prompt, condition_BCHW)
    return (prediction_BCHW - target_BCHW).square().mean(dim=(1, 2, 3))


def predict(
    models: BaseModels,
    sample_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
    prompt: Prompt,
    controlnet_cond_BCHW: torch.Tensor,
) -> torch.Tensor:
    """The UNet's output under the ControlNet's control, float32."""
    inputs = (models.as_input(sample_BCHW), timesteps_B, prompt)
    residuals = control_residuals(models, models.controlnet, *inputs, models.as_input(controlnet_cond_BCHW))
    return controlled_prediction(models, *inputs, residuals)


def control_residuals(
    models: BaseModels,
    controlnet: Any,
    sample_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
    prompt: Prompt,
    controlnet_cond_BCHW: torch.Tensor,
    *,
    conditioning_scale: float = 1.0,
    graded: bool = False,
) -> list[torch.Tensor]:
    """What a ControlNet adds to the UNet: one for each skip connection, and the mid block's. Inputs are `as_input`.

    There may be fewer conditions than samples: they are those of the last, and the first get no control.
    `conditioning_scale` and `graded` are `shared.diffusion.control.Strength`'s.
    """
    uncontrolled = len(sample_BCHW) - len(controlnet_cond_BCHW)
    controlled = (sample_BCHW, timesteps_B, prompt)
    if uncontrolled:
        controlled = (sample_BCHW[uncontrolled:], timesteps_B[uncontrolled:], prompt.after(uncontrolled))
    controlled_sample_BCHW, controlled_timesteps_B, controlled_prompt = controlled
    with record_function("controlnet"):
        down, mid = controlnet(
            controlled_sample_BCHW,
            controlled_timesteps_B,
            encoder_hidden_states=controlled_prompt.encoder_hidden_states_BLD,
            added_cond_kwargs=controlled_prompt.added_cond_kwargs,
            controlnet_cond=controlnet_cond_BCHW,
            conditioning_scale=conditioning_scale,
            return_dict=False,
        )
        residuals = [residual.to(models.dtype) for residual in (*down, mid)]
        if graded:
            residuals = _graded(residuals)
        return _after_zeros(residuals, uncontrolled) if uncontrolled else residuals


def controlled_prediction(
    models: BaseModels,
    sample_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
    prompt: Prompt,
    residuals: list[torch.Tensor],
) -> torch.Tensor:
    """The UNet's output with what ControlNets add, float32."""
    with record_function("unet"):
        (prediction_BCHW,) = models.unet(
            sample_BCHW,
            timesteps_B,
            encoder_hidden_states=prompt.encoder_hidden_states_BLD,
            added_cond_kwargs=prompt.added_cond_kwargs,
            down_block_additional_residuals=tuple(residuals[:-1]),
            mid_block_additional_residual=residuals[-1],
            return_dict=False,
        )
    return prediction_BCHW.float()


def _graded(residuals: list[torch.Tensor]) -> list[torch.Tensor]:
    return [residual * factor for residual, factor in zip(residuals, grades(len(residuals)), strict=True)]


def _after_zeros(residuals: list[torch.Tensor], rows: int) -> list[torch.Tensor]:
    return [torch.cat([residual.new_zeros((rows, *residual.shape[1:])), residual]) for residual in residuals]


class StepResult:
    """What a step came to, on its way from the device. Reading waits for this step, not for one dispatched after it."""

    def __init__(self, loss: torch.Tensor, grad_norm: torch.Tensor, asked: torch.Tensor):
        """Both are of shape [] and over all processes; of `asked`, shape [R], above 0 is what one of them asks for."""
        device = loss.device
        self._host = torch.cat([torch.stack([loss, grad_norm]), asked]).to("cpu", non_blocking=True)
        self._arrived = None if device.type == "cpu" else torch.Event(device)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> tuple[float, float, Requests]:
        """Loss, gradient norm, and what any process asked for before this step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, grad_norm, *asked = self._host.tolist()
        return loss, grad_norm, Requests(*(flag > 0 for flag in asked))


class TrainStep:
    """`step(batch, learning_rate) → StepResult`, the loss over all processes and the gradients' norm before clipping.

    From the first step on where one of them is not finite, nothing is changed any more: the state stays what was last
    good, however many steps are already on their way. (DeepSpeed moves in the backward pass, by rules of its own.)
    """

    def __init__(
        self,
        accelerator: Accelerator,
        models: BaseModels,
        objective: Objective,
        optimizer: Any,
        config: TrainConfig,
        average: WeightAverage | None = None,
    ):
        self.accelerator, self.models, self.objective = accelerator, models, objective
        self.optimizer, self.config, self.average = optimizer, config, average
        self._non_finite = torch.zeros((), device=accelerator.device)  # 0 or 1, as PyTorch's optimizers take it

    @property
    def keeps_what_was_good(self) -> bool:
        """DeepSpeed looks for what is not finite in fp16 alone, and takes the step in other precisions."""
        accelerator = self.accelerator
        return accelerator.distributed_type != DistributedType.DEEPSPEED or accelerator.mixed_precision == "fp16"

    @property
    def loss_scale(self) -> float | None:
        """Of the next step; None without fp16's loss scaling."""
        if self.accelerator.mixed_precision != "fp16":
            return None
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return float(self.optimizer.optimizer.loss_scale)
        assert self.accelerator.scaler is not None
        return float(self.accelerator.scaler.get_scale())

    def __call__(self, batch: Batch, learning_rate: float, requests: Requests = NO_REQUESTS) -> StepResult:
        """Dispatch one step. What this process asks for, `requests`, reaches all with the result."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        while True:
            loss, grad_norm, asked = self._gradients(batch, requests)
            if self._scale_is_too_high(loss, grad_norm):
                self.optimizer.step()  # with gradients that overflowed, it only lowers the loss scale
                self._forget_gradients()
                # The batch belongs to this step: it is taken again with the lower scale, so that no sample is lost and
                # the count of steps stays that of the optimizer's moves.
                continue
            self._non_finite = self._non_finite.maximum(1 - (loss.isfinite() & grad_norm.isfinite()).float())
            with record_function("optimizer"):
                self._move()
            self._forget_gradients()
            return StepResult(loss, grad_norm, asked)

    def _gradients(self, batch: Batch, requests: Requests) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        accelerator, models = self.accelerator, self.models
        microbatches = len(batch["timesteps"])
        total = torch.zeros((), device=accelerator.device)
        for index in range(microbatches):
            microbatch = to_device({name: array[index] for name, array in batch.items()}, accelerator.device)
            with accelerator.accumulate(*models.trained):
                losses_B = per_sample_losses(models, microbatch, self.objective)
                loss = (self.objective.loss_weights[microbatch["timesteps"].long()] * losses_B).mean()
                accelerator.backward(loss)
            total += loss.detach() / microbatches
        parameters = [param for model in models.trained for param in model.parameters()]
        with record_function("optimizer"):
            grad_norm = _plain(accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm), total.device)
        flags = [torch.full_like(total, float(flag)) for flag in requests]  # the device is not waited for
        reduced = accelerator.reduce(torch.stack([total, *flags]), reduction="mean")
        return reduced[0], grad_norm, reduced[1:]

    def _scale_is_too_high(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> bool:
        """Whether fp16 gradients overflowed and a lower scale may mend it. Waits for the step, in fp16."""
        scale = self.loss_scale
        if scale is None or scale <= 1 or self._non_finite.item():
            return False
        return bool(loss.isfinite() & ~grad_norm.isfinite())

    def _move(self) -> None:
        """The optimizer's step, unless a figure is not finite: the device decides, where the optimizer lets it."""
        if self.accelerator.scaler is None and self.optimizer.optimizer.defaults.get("fused"):
            # The protocol by which torch.amp.GradScaler leaves this decision to fused optimizers.
            self.optimizer.optimizer.found_inf = self._non_finite
        elif self._non_finite.item():
            return
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self._non_finite)

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.config.set_grads_to_none)


def _plain(grad_norm: Any, device: torch.device) -> torch.Tensor:
    """What accelerate's plugins return as a norm, as float32 []."""
    whole = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    return torch.as_tensor(whole, dtype=torch.float32, device=device)
