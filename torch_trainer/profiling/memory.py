"""What is in the memory of a GPU, and from where it was allocated, for https://pytorch.org/memory_viz.

https://docs.pytorch.org/docs/stable/torch_cuda_memory.html describes the snapshots.
"""

import logging
from pathlib import Path

import torch

from shared.config import TrainConfig
from shared.outgoing.atomic_files import write_atomically
from shared.profiling.only_watching import only_watching
from shared.user_errors import UserError

logger = logging.getLogger(__name__)


def remember_allocations(config: TrainConfig, device: torch.device) -> None:
    """With `--profile_memory`, from now on note of everything in device memory which lines of code asked for it.

    Raises:
        UserError: the device keeps no account of its memory.
    """
    if not config.profile_memory:
        return
    if device.type != "cuda":
        raise UserError(
            f"--profile_memory is given, and this run is on {device}; in PyTorch it needs an NVIDIA or AMD GPU, whose "
            "memory it describes. Leave the flag out; the peak of the host's memory is in report.json."
        )
    # Of what is there, not of what came and went: that would grow from step to step.
    torch.cuda.memory._record_memory_history(enabled="state", context="state", stacks="python")


def write_memory(config: TrainConfig, moment: str) -> None:
    """With `--profile_memory`, write what is in device memory at this moment ("initial" or "final")."""
    if config.profile_memory:
        file = Path(config.output_dir) / f"memory_{moment}.pickle"
        with only_watching("A profile of device memory"):
            write_atomically(file, lambda temporary: torch.cuda.memory._dump_snapshot(str(temporary)))
            logger.info("What is in device memory is in %s; look at it in https://pytorch.org/memory_viz", file)
