"""The learning rate of both phases: a short warm-up, then half a cosine down to nothing."""

import math

import torch

_WARMUP_STEPS = 100


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Multiplies the optimizer's learning rate; call its `step()` after each of the `steps` optimizer steps."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
