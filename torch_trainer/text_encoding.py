"""Text encoders that work once, before the training (`--precompute_text`).

Axes: B texts at once, L tokens.
"""

import os
from typing import Any

import numpy.typing as npt
import torch
from accelerate import Accelerator

from shared.config import TrainConfig
from shared.data.tokenization import TokenIds
from shared.precomputed_text.precomputing import Processes, TextEncoder
from torch_trainer.base_models import load_text_encoders
from torch_trainer.distributed.accelerator import COMPUTE_DTYPES
from torch_trainer.training.step import encode_tokens, to_device

_ROWS = 32


def open_text_encoder(config: TrainConfig, accelerator: Accelerator, *, is_xl: bool) -> TextEncoder:
    """The base model's, on this process's device. Freed with what is returned.

    Raises:
        UserError: one is not there, or does not fit its configuration.
    """
    text_encoders = load_text_encoders(config, COMPUTE_DTYPES[accelerator.mixed_precision], is_xl=is_xl)
    for model in filter(None, text_encoders):
        model.to(accelerator.device)

    def encode(token_ids: TokenIds) -> dict[str, npt.NDArray[Any]]:
        encoded = encode_tokens(text_encoders, to_device(dict(token_ids), accelerator.device))
        return {name: as_stored(tensor.cpu()) for name, tensor in encoded.items()}

    return TextEncoder(_ROWS, encode)


def processes_of_host(accelerator: Accelerator) -> Processes:
    """They see the same folder; another host may have one of its own."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Processes(accelerator.local_process_index, count, accelerator.wait_for_everyone)


def as_stored(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """bfloat16 as the bits that it is: numpy does not know it."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
