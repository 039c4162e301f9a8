"""The ControlNet's weights and its optimizer's moments as whole float32 tensors, however the processes hold them."""

from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator

from torch_trainer.weight_average import WeightAverage

Tensors = dict[str, torch.Tensor]


class StateTensors(NamedTuple):
    """Parameters by name, and by name the optimizer's state: `exp_avg` and `exp_avg_sq`, or what 8-bit AdamW keeps.

    `average` is the moving average of the parameters, empty where none is kept.
    """

    params: Tensors
    optimizer: dict[str, Tensors]
    average: Tensors = {}  # noqa: RUF012 (nothing writes to it)


class TrainableState(Protocol):
    """What checkpoints read and write. All processes call it together."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, whole."""
        ...

    def params(self) -> Tensors:
        """Whole float32 weights on the CPU; in other processes than the main one they may be missing."""
        ...

    def tensors(self) -> StateTensors:
        """`params` and the optimizer's state, which is there after the first step."""
        ...

    def load(self, tensors: StateTensors, step: int) -> None:
        """Continue from these, after `step` steps.

        Raises:
            ValueError: the state is that of another kind of optimizer.
        """
        ...


class ReplicatedState:
    """Every process holds everything: a single process, or data parallelism. `average` is None where none is kept."""

    def __init__(self, accelerator: Accelerator, controlnet: Any, optimizer: Any, average: WeightAverage | None = None):
        self._controlnet = accelerator.unwrap_model(controlnet)
        self._optimizer = optimizer.optimizer
        self._average = average

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(param.shape) for name, param in self._controlnet.named_parameters()}

    def params(self) -> Tensors:
        return {name: _on_cpu(param) for name, param in self._controlnet.named_parameters()}

    def tensors(self) -> StateTensors:
        return StateTensors(
            self.params(),
            {
                name: {
                    kind: _on_cpu(value)
                    for kind, value in self._optimizer.state[param].items()
                    if isinstance(value, torch.Tensor) and kind != "step"  # all parameters count the same steps
                }
                for name, param in self._controlnet.named_parameters()
            },
            {} if self._average is None else {name: _on_cpu(mean) for name, mean in self._average.means.items()},
        )

    def load(self, tensors: StateTensors, step: int) -> None:
        is_adamw = isinstance(self._optimizer, torch.optim.AdamW)
        if is_adamw != all("exp_avg" in kinds for kinds in tensors.optimizer.values()):
            raise ValueError(
                f"The checkpoint was saved {'with' if is_adamw else 'without'} --use_8bit_adam, and the optimizer's "
                f"state cannot be converted. {'Add' if is_adamw else 'Leave out'} that flag to resume."
            )
        entries: dict[int, dict[str, Any]] = {}
        # named_parameters' order is that in which the optimizer was given the parameters and numbers them.
        for index, (name, param) in enumerate(self._controlnet.named_parameters()):
            param.data.copy_(tensors.params[name])
            entries[index] = {
                kind: _in_memory_order_of(param, value) for kind, value in tensors.optimizer[name].items()
            }
            entries[index]["step"] = torch.tensor(float(step)) if is_adamw else step
        self._optimizer.load_state_dict(
            {"state": entries, "param_groups": self._optimizer.state_dict()["param_groups"]}
        )
        if self._average is not None:
            self._average.load(tensors.average, step)


def _on_cpu(value: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own: 8-bit AdamW's parameters share their maps, which no safetensors file may."""
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _in_memory_order_of(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value with the parameter's strides, as the optimizer itself allocates its moments."""
    return torch.empty_like(param, dtype=value.dtype).copy_(value) if value.shape == param.shape else value
