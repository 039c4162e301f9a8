"""The models on the device, divided among the processes as accelerate's configuration says, ready for training."""

import math
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType

from shared.config import TrainConfig
from shared.user_errors import UserError
from torch_trainer.base_models import BaseModels
from torch_trainer.compilation import compile_model
from torch_trainer.distributed.deepspeed_state import DeepSpeedState
from torch_trainer.distributed.fsdp_state import FSDPState
from torch_trainer.distributed.trainable_state import ReplicatedState, TrainableState, trained_parameters
from torch_trainer.training.attention import choose_attention
from torch_trainer.training.optimizer import make_optimizer
from torch_trainer.training.precision import compute_in_dtype_of_input
from torch_trainer.training.weight_average import WeightAverage

_DEVICES_WITH_FUSED_OPTIMIZERS = ("cpu", "cuda", "xpu")  # that take a decision of the device, `found_inf`, too


class Placed(NamedTuple):
    """The prepared optimizer, the state that it and the trained models make up, and with --use_ema their average."""

    optimizer: Any
    state: TrainableState
    average: WeightAverage | None


def place(config: TrainConfig, accelerator: Accelerator, models: BaseModels) -> Placed:
    """Prepare `models` in place.

    Raises:
        UserError: an attention or optimizer that is asked for is not there or cannot run.
    """
    kind = accelerator.distributed_type
    is_divided = kind in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    text_encoders = [model for model in (models.text_encoder, models.text_encoder_2) if model is not None]
    vae = [models.vae] if config.uses_vae else []  # which else stays in the host's memory
    for model in (*vae, models.unet, *text_encoders):
        model.to(accelerator.device)
    if config.torch_compile or _group_norm_keeps_channels_last(accelerator.device):
        models.memory_format = torch.channels_last
        for model in (*vae, models.unet):
            model.to(memory_format=torch.channels_last)
        if not is_divided:  # they cut up contiguous memory only
            models.controlnet.to(memory_format=torch.channels_last)
    for model in models.trained:
        compute_in_dtype_of_input(model)
    if config.use_8bit_adam:
        # As bitsandbytes lays them at its first step. The first of a resumed run would else round otherwise.
        for param in filter(_is_trained, chain(*(model.parameters() for model in models.trained))):
            param.data = param.data.contiguous()
    if config.gradient_checkpointing:
        for model in (models.controlnet, models.unet):
            model.enable_gradient_checkpointing()
    choose_attention(config, [models.controlnet, models.unet], accelerator.device)
    if config.torch_compile:
        for model in (models.controlnet, models.unet, models.vae.encoder, *text_encoders):
            compile_model(model, config)
    optimizer = make_optimizer(
        config,
        filter(_is_trained, chain(*(model.parameters() for model in models.trained))),
        fused=not is_divided and accelerator.device.type in _DEVICES_WITH_FUSED_OPTIMIZERS,
    )
    if kind == DistributedType.DEEPSPEED:
        return Placed(*_prepare_deepspeed(config, accelerator, models, optimizer), None)
    if models.sd_unlocked:
        models.unet = accelerator.prepare_model(models.unet)
    models.controlnet, prepared = accelerator.prepare(models.controlnet, optimizer)
    if kind == DistributedType.FSDP:
        return Placed(prepared, FSDPState(models.controlnet, prepared), None)
    parameters = trained_parameters(*map(accelerator.unwrap_model, models.trained))
    average = WeightAverage(parameters) if config.use_ema else None
    return Placed(prepared, ReplicatedState(parameters, prepared, average), average)


def _group_norm_keeps_channels_last(device: torch.device) -> bool:
    """Otherwise the feature maps between convolutions would be copied into another order twice for each norm.

    CUDA's did so up to PyTorch 2.13 or later (https://github.com/pytorch/pytorch/pull/191945 teaches it the order).
    """
    maps_BCHW = torch.zeros((1, 4, 2, 2), device=device).to(memory_format=torch.channels_last)
    return F.group_norm(maps_BCHW, 2).is_contiguous(memory_format=torch.channels_last)


def _is_trained(param: torch.nn.Parameter) -> bool:
    return param.requires_grad


def _prepare_deepspeed(
    config: TrainConfig, accelerator: Accelerator, models: BaseModels, optimizer: torch.optim.Optimizer
) -> tuple[Any, TrainableState]:
    plugin = accelerator.state.deepspeed_plugin
    assert plugin is not None
    settings = plugin.deepspeed_config
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2):
        raise UserError(
            f"accelerate's configuration asks for DeepSpeed ZeRO stage {stage}; expected 1 or 2. For parameters that "
            "are divided too, use FSDP (torch_trainer/accelerate_configs/fsdp.yaml)."
        )
    if config.use_8bit_adam:
        raise UserError(
            "--use_8bit_adam does not go with DeepSpeed, which has an optimizer of its own: leave one of the two out."
        )
    # What DeepSpeed would read off a DataLoader, and what it does by itself in place of Accelerator.clip_grad_norm_.
    settings["train_micro_batch_size_per_gpu"] = config.train_batch_size
    settings["gradient_clipping"] = config.max_grad_norm if math.isfinite(config.max_grad_norm) else 0.0
    params = {name: param.detach().clone() for name, param in models.controlnet.named_parameters()}
    models.controlnet, prepared = accelerator.prepare(models.controlnet, optimizer)
    state = DeepSpeedState(models.controlnet, prepared)
    state.set_params(params)  # under mixed precision DeepSpeed has made its masters from rounded weights
    return prepared, state
