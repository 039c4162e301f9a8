"""The trained weights and their optimizer's moments as whole float32 tensors, however the processes hold them."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from shared.checkpoints.policy import RESUME_FROM_ANOTHER
from shared.checkpoints.portable import is_of_8_bits
from shared.models.trained_parts import with_unet_prefix
from shared.untrusted import shown
from shared.user_errors import UserError
from torch_trainer.training.weight_average import WeightAverage

Tensors = dict[str, torch.Tensor]
_8_BIT_BLOCK = 256  # numbers that share a scale


class StateTensors(NamedTuple):
    """Parameters by name, and by name the optimizer's state: `exp_avg` and `exp_avg_sq`, or what 8-bit AdamW keeps.

    `average` is the moving average of the parameters, empty where none is kept.
    """

    params: Tensors
    optimizer: dict[str, Tensors]
    average: Tensors = {}  # noqa: RUF012 (nothing writes to it)


class TrainableState(Protocol):
    """What checkpoints read and write. Where it `is_divided` among the processes, all of them call it together."""

    is_divided: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, whole."""
        ...

    def params(self) -> Tensors:
        """Whole float32 weights on the CPU; in other processes than the main one they may be missing."""
        ...

    def tensors(self, memory: Tensors | None = None) -> StateTensors:
        """`params` and the optimizer's state, which is there after the first step: copies, which no step changes.

        With the same `memory` again, they may overwrite those of the call before.
        """
        ...

    def load(self, tensors: StateTensors, step: int) -> None:
        """Continue from these, after `step` steps.

        Raises:
            UserError: the state is that of another kind of optimizer, or lacks the average that this run keeps.
        """
        ...


def trained_parameters(
    controlnet: torch.nn.Module, unet: torch.nn.Module | None = None
) -> dict[str, torch.nn.Parameter]:
    """By their names in checkpoints: all of the ControlNet's, and of a UNet those that are trained."""
    of_unet = {} if unet is None else {name: param for name, param in unet.named_parameters() if param.requires_grad}
    return dict(controlnet.named_parameters()) | with_unet_prefix(of_unet)


class ReplicatedState:
    """Every process holds everything: a single process, or data parallelism.

    `parameters` are `trained_parameters`, `average` is None where none is kept.
    """

    is_divided = False

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], optimizer: Any, average: WeightAverage | None):
        self._parameters, self._optimizer, self._average = parameters, optimizer.optimizer, average
        self._is_adamw = isinstance(self._optimizer, torch.optim.AdamW)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(param.shape) for name, param in self._parameters.items()}

    def params(self) -> Tensors:
        return _on_cpu(self._parameters, {}, "params")

    def tensors(self, memory: Tensors | None = None) -> StateTensors:
        memory = {} if memory is None else memory
        return StateTensors(
            _on_cpu(self._parameters, memory, "params"),
            {name: _on_cpu(self._optimizer_state(p), memory, name) for name, p in self._parameters.items()},
            {} if self._average is None else _on_cpu(self._average.means, memory, "average"),
        )

    def _optimizer_state(self, param: torch.nn.Parameter) -> Tensors:
        if (
            not param.requires_grad and self._is_adamw
        ):  # the moments of a gradient of zero, as the Flax backend has them
            return {kind: torch.zeros(param.shape) for kind in ("exp_avg", "exp_avg_sq")}
        return {
            kind: value
            for kind, value in self._optimizer.state.get(param, {}).items()
            if isinstance(value, torch.Tensor) and kind != "step"  # all parameters count the same steps
        }

    def load(self, tensors: StateTensors, step: int) -> None:
        is_adamw = self._is_adamw
        if is_adamw == any(map(is_of_8_bits, tensors.optimizer.values())):
            raise UserError(
                f"The checkpoint was saved {'with' if is_adamw else 'without'} --use_8bit_adam, and the optimizer's "
                f"state cannot be converted. {'Add' if is_adamw else 'Leave out'} that flag to resume."
            )
        if self._average is not None and tensors.average.keys() != self._parameters.keys():
            raise UserError(
                f"The checkpoint holds the moving average of {len(tensors.average)} parameters, and this run averages "
                f"{len(self._parameters)}. Resume from another checkpoint."
            )
        if not is_adamw:
            _check_8_bit_state(self._parameters, tensors.optimizer)
        entries: dict[int, dict[str, Any]] = {}
        for name, param in self._parameters.items():
            param.data.copy_(tensors.params[name])
            if param.requires_grad:
                entry: dict[str, Any] = {
                    kind: _in_memory_order_of(param, value) for kind, value in tensors.optimizer[name].items()
                }
                # The optimizer was given the parameters in this order, and numbers them.
                entries[len(entries)] = entry | {"step": torch.tensor(float(step)) if is_adamw else step}
        self._optimizer.load_state_dict(
            {"state": entries, "param_groups": self._optimizer.state_dict()["param_groups"]}
        )
        if self._average is not None:
            self._average.load(tensors.average, step)


def _check_8_bit_state(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    """Kernels go by these sizes without asking. Small parameters have whole moments, in `state1` and `state2`."""
    for name, param in parameters.items():
        if not param.requires_grad:
            continue
        kinds = optimizer.get(name, {})
        layouts = {kind: (value.dtype, tuple(value.shape)) for kind, value in kinds.items()}
        if not any(layouts == _8_bit_layouts(param, number) for number in (torch.float32, torch.uint8)):
            raise UserError(
                f"The checkpoint does not hold the state of 8-bit AdamW for {shown(name)}: it is damaged, or another "
                f"program wrote it. {RESUME_FROM_ANOTHER}"
            )


def _8_bit_layouts(param: torch.Tensor, number: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """As bitsandbytes makes it (`Optimizer2State.init_state`)."""
    layouts = {f"state{moment}": (number, tuple(param.shape)) for moment in (1, 2)}
    if number == torch.uint8:
        blocks = -(-param.numel() // _8_BIT_BLOCK)
        layouts |= {f"qmap{moment}": (torch.float32, (256,)) for moment in (1, 2)}
        layouts |= {f"absmax{moment}": (torch.float32, (blocks,)) for moment in (1, 2)}
    return layouts


def _on_cpu(tensors: Mapping[str, torch.Tensor], memory: Tensors, where: str) -> Tensors:
    """Copies in memory of their own: on CPUs the optimizer goes on writing to what it has, and 8-bit AdamW's parameters
    share their maps, which no safetensors file may.

    They are kept in `memory`, by `where` and their name, for the next time: to be given fresh memory takes a process
    several times as long as to copy into it.
    """
    copies = {}
    for name, tensor in tensors.items():
        key = f"{where}/{name}"
        if key not in memory:
            memory[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = memory[key].copy_(tensor.detach())
    return copies


def _in_memory_order_of(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value with the parameter's strides, as the optimizer itself allocates its moments."""
    return torch.empty_like(param, dtype=value.dtype).copy_(value) if value.shape == param.shape else value
