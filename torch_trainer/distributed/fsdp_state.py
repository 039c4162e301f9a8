"""The trainable state under FSDP 2, where each process holds a part of every parameter and of its moments."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from shared.user_errors import UserError
from torch_trainer.distributed.trainable_state import StateTensors, Tensors

_MOMENTS = ("exp_avg", "exp_avg_sq")


class FSDPState:
    """`controlnet` and `optimizer` are what `Accelerator.prepare` returns."""

    is_divided = True

    def __init__(self, controlnet: Any, optimizer: Any):
        self._controlnet, self._optimizer = controlnet, optimizer.optimizer

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(param.shape) for name, param in self._controlnet.named_parameters()}

    def params(self) -> Tensors:
        return {name: _whole(param) for name, param in self._controlnet.named_parameters()}

    def tensors(self, memory: Tensors | None = None) -> StateTensors:
        moments = {
            name: {kind: _whole(self._optimizer.state[param][kind]) for kind in _MOMENTS}
            for name, param in self._controlnet.named_parameters()
        }
        return StateTensors(self.params(), moments)

    @torch.no_grad()
    def load(self, tensors: StateTensors, step: int) -> None:
        if not all(set(_MOMENTS) <= kinds.keys() for kinds in tensors.optimizer.values()):
            raise UserError(
                "The checkpoint was saved with --use_8bit_adam, whose state cannot be divided among processes. Resume "
                "without FSDP and with that flag."
            )
        for name, param in self._controlnet.named_parameters():
            param.copy_(_like(param, tensors.params[name]))
            moments = {kind: _like(param, tensors.optimizer[name][kind]) for kind in _MOMENTS}
            self._optimizer.state[param] = {"step": torch.tensor(float(step)), **moments}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU; the processes put it together from their parts."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True)


def _like(param: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    whole = whole.to(param.device)
    return distribute_tensor(whole, param.device_mesh, param.placements) if isinstance(param, DTensor) else whole
