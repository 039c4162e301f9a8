"""Which attention the UNet and the ControlNet use: PyTorch's own, unless another is asked for and can run."""

import importlib.metadata
import importlib.util
from typing import Any

import torch

from shared.config import TrainConfig
from shared.user_errors import UserError

_ADVICE = "Leave the flag out: PyTorch's own memory-efficient attention is used without it."


def choose_attention(config: TrainConfig, models: list[Any], device: torch.device) -> None:
    """Switch the models to what `--enable_xformers_memory_efficient_attention` or `--enable_npu_flash_attention` name.

    Raises:
        UserError: the package is not installed, or cannot run on the device.
    """
    if config.enable_xformers_memory_efficient_attention:
        _check_xformers(device)
        for model in models:
            model.enable_xformers_memory_efficient_attention()
    if config.enable_npu_flash_attention:
        _check_npu(device)
        for model in models:
            model.enable_npu_flash_attention()


def _check_xformers(device: torch.device) -> None:
    """Take xFormers through a forward and a backward pass, for it is often built for another PyTorch or device."""
    if importlib.util.find_spec("xformers") is None:
        raise UserError(
            "--enable_xformers_memory_efficient_attention needs the xformers package, which is not installed. Run "
            f"`pip install xformers` (it needs an NVIDIA or AMD GPU). {_ADVICE}"
        )
    try:
        from xformers.ops import memory_efficient_attention

        query_BLHD = torch.randn(1, 8, 2, 40, device=device, requires_grad=True)
        memory_efficient_attention(query_BLHD, query_BLHD, query_BLHD).sum().backward()
    # AttributeError and OSError: of the PyTorch or the shared library that it was built for.
    except (ImportError, AttributeError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].strip()
        raise UserError(
            "--enable_xformers_memory_efficient_attention: xFormers "
            f"{importlib.metadata.version('xformers')} cannot run on {device} with PyTorch {torch.__version__} "
            f"({reason}). {_ADVICE}"
        ) from error


def _check_npu(device: torch.device) -> None:
    if importlib.util.find_spec("torch_npu") is None:
        raise UserError(
            "--enable_npu_flash_attention needs the torch_npu package and an Ascend NPU, and the package is not "
            f"installed. {_ADVICE}"
        )
    if device.type != "npu":
        raise UserError(f"--enable_npu_flash_attention needs an Ascend NPU, and this run is on {device}. {_ADVICE}")
