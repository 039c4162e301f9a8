"""The trainable state under DeepSpeed's ZeRO stages 1 and 2: each process holds a part of float32 masters and moments.

DeepSpeed hands out whole tensors one parameter at a time; every process has to ask for them, in the same order.
"""

from typing import Any

import torch

from shared.user_errors import UserError
from torch_trainer.distributed.trainable_state import StateTensors, Tensors

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedState:
    """`engine` and `optimizer` are what `Accelerator.prepare` returns."""

    is_divided = True

    def __init__(self, engine: Any, optimizer: Any):
        self._controlnet = engine.module
        self._zero = optimizer.optimizer

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(param.shape) for name, param in self._controlnet.named_parameters()}

    def params(self) -> Tensors:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(param).cpu() for name, param in self._controlnet.named_parameters()}

    def tensors(self, memory: Tensors | None = None) -> StateTensors:
        from deepspeed.utils import safe_get_full_optimizer_state

        moments = {
            name: {kind: safe_get_full_optimizer_state(param, kind).cpu() for kind in _MOMENTS}
            for name, param in self._controlnet.named_parameters()
        }
        return StateTensors(self.params(), moments)

    def set_params(self, params: Tensors) -> None:
        """Replace the float32 masters and the rounded weights that the module computes with."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, param in self._controlnet.named_parameters():
            safe_set_full_fp32_param(param, params[name])
        self._zero.update_lp_params()

    def load(self, tensors: StateTensors, step: int) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not all(set(_MOMENTS) <= kinds.keys() for kinds in tensors.optimizer.values()):
            raise UserError(
                "The checkpoint was saved with --use_8bit_adam, and the optimizer's state cannot be converted to "
                "DeepSpeed's. Resume without DeepSpeed and with that flag."
            )
        count = torch.tensor(float(step)) if isinstance(self._zero.optimizer, torch.optim.AdamW) else step
        # DeepSpeed makes the optimizer's state at the first step only.
        for flat in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[flat] = {"step": count, **{kind: torch.zeros_like(flat) for kind in _MOMENTS}}
        self._zero._lazy_init_hp_params_optimizer_state()
        for name, param in self._controlnet.named_parameters():
            for kind in _MOMENTS:
                safe_set_full_optimizer_state(param, tensors.optimizer[name][kind], kind)
        self.set_params(tensors.params)
