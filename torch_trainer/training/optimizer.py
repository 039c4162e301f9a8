"""AdamW on the trained parameters, in 32 or 8 bits."""

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch

from shared.config import TrainConfig
from shared.user_errors import UserError


def make_optimizer(
    config: TrainConfig, parameters: Iterable[torch.nn.Parameter], *, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019). Every step sets the learning rate anew.

    `fused` takes PyTorch's single kernel for 32-bit AdamW, which CPUs, NVIDIA's, AMD's and Intel's GPUs have.

    Under a DeepSpeed configuration that offloads the optimizer, accelerate replaces it with DeepSpeedCPUAdam of the
    same settings when it prepares it.

    Raises:
        UserError: `--use_8bit_adam` without the bitsandbytes package.
    """
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW
    if config.use_8bit_adam:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "--use_8bit_adam needs the bitsandbytes package, which is not installed. Run "
                "`pip install bitsandbytes`."
            )
        from bitsandbytes.optim import AdamW8bit

        optimizer_class, fused = AdamW8bit, False
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    if fused:
        settings["fused"] = True
    return optimizer_class(parameters, **settings)
