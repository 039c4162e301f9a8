"""AdamW in the three forms that a run may ask for."""

import importlib.util
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from shared.config import TrainConfig


def make_optimizer(config: TrainConfig, accelerator: Accelerator, controlnet: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) on the ControlNet. Every step sets the learning rate anew.

    Raises:
        ValueError: a package that the configuration asks for is missing.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if _offloads_optimizer(accelerator):
        if config.use_8bit_adam:
            raise ValueError(
                "--use_8bit_adam does not go with accelerate's DeepSpeed configuration, which keeps the optimizer in "
                "the CPU's memory, in 32 bits: leave one of the two out."
            )
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(controlnet.parameters(), adamw_mode=True, **settings)
    if config.use_8bit_adam:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "--use_8bit_adam needs the bitsandbytes package, which is not installed. Run "
                "`pip install bitsandbytes`."
            )
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(controlnet.parameters(), **settings)
    return torch.optim.AdamW(controlnet.parameters(), **settings)


def _offloads_optimizer(accelerator: Accelerator) -> bool:
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    plugin = accelerator.state.deepspeed_plugin
    assert plugin is not None
    offload = plugin.deepspeed_config.get("zero_optimization", {}).get("offload_optimizer", {})
    return bool(offload.get("device", "none") == "cpu")
