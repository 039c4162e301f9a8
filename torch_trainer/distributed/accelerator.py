"""The one place that talks to accelerate about processes, devices and precision."""

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import (
    AutocastKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
)

from shared.config import TrainConfig
from shared.config.options import FLAGS
from shared.user_errors import UserError

_ONLY_WITH_WHOLE_WEIGHTS = [name for name, flag in FLAGS.items() if flag.needs_whole_weights]
COMPUTE_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Join the other processes and take a device, as `accelerate launch` and its configuration say.

    Raises:
        UserError: accelerate's configuration and the command line contradict each other, or the device cannot do what
            they ask for.
    """
    _check_weights_are_whole(config)
    _set_float32_precision(config.allow_tf32)
    torch.backends.cudnn.benchmark = True  # all steps have the same shapes, so the search for algorithms pays off
    on_cpu, is_deepspeed = not torch.accelerator.is_available(), _launched_with("DEEPSPEED")
    if on_cpu and (config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16":
        # Here, for accelerate refuses it in its own words.
        raise UserError(
            "Mixed precision fp16 needs an accelerator, and this run is on the CPU. Use --mixed_precision bf16, or no."
        )
    handlers: list[KwargsHandler] = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        AutocastKwargs(enabled=False),  # layers choose their precision themselves (training/precision.py)
    ]
    if on_cpu and is_deepspeed:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    try:
        accelerator = Accelerator(
            # Without it, accelerate makes several processes on CPUs a run each; with it, it leaves DeepSpeed out.
            cpu=on_cpu and not is_deepspeed,
            # None leaves it to accelerate's configuration.
            mixed_precision=config.mixed_precision,
            # The plugin, because the environment takes precedence over the plain argument.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
            ),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=handlers,
        )
    except ValueError as error:
        raise UserError(
            f"accelerate cannot start with its configuration and this environment: {error}. See `accelerate env`, and "
            "start several processes with `accelerate launch` or torchrun, which set what they need to find each other."
        ) from error
    _check(accelerator, config)
    return accelerator


def _check(accelerator: Accelerator, config: TrainConfig) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}: each would train by "
            "itself. Check the accelerate configuration (`accelerate env` shows it) and the devices it asks for."
        )
    for kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        if _launched_with(kind.value) and accelerator.distributed_type != kind:
            raise UserError(
                f"accelerate's configuration asks for {kind.value}, which cannot run on {accelerator.device}. Choose "
                "another configuration, for instance torch_trainer/accelerate_configs/multi_cpu.yaml."
            )
    if accelerator.mixed_precision not in COMPUTE_DTYPES:
        raise UserError(
            f"accelerate's configuration asks for mixed precision {accelerator.mixed_precision}; expected one of "
            f"{', '.join(COMPUTE_DTYPES)}. Give --mixed_precision, which takes precedence."
        )
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise UserError(
            f"accelerate's configuration accumulates {accelerator.gradient_accumulation_steps} batches and "
            f"--gradient_accumulation_steps is {config.gradient_accumulation_steps}. Give both the same number."
        )


def _check_weights_are_whole(config: TrainConfig) -> None:
    for kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        for flag in _ONLY_WITH_WHOLE_WEIGHTS:
            if _launched_with(kind.value) and getattr(config, flag):
                raise UserError(
                    f"--{flag} does not go with {kind.value}, which divides what is trained among the processes. Leave "
                    "it out, or let each process have the whole, as torch_trainer/accelerate_configs/multi_gpu.yaml "
                    "does."
                )


def _launched_with(plugin: str) -> bool:
    """Whether `accelerate launch` announces this plugin, the way accelerate itself reads it."""
    return os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true"


def device_name(device: torch.device) -> str:
    """What its maker calls it, where PyTorch knows."""
    module = getattr(torch, device.type)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type


def peak_device_memory_gib() -> float | None:
    """Of this process's device; None where there is none beside the CPU, or it counts no peak, as Apple's."""
    if not torch.accelerator.is_available():
        return None
    try:
        return torch.accelerator.max_memory_allocated() / 2**30
    except RuntimeError:
        return None


def _set_float32_precision(allow_tf32: bool) -> None:
    """float32 means float32, convolutions included, unless TF32 is asked for; PyTorch lets them use it by default."""
    torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
    torch.backends.cudnn.conv.fp32_precision = "tf32" if allow_tf32 else "ieee"  # type: ignore[attr-defined]
