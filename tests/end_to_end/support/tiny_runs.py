"""The training run that tests repeat with variations: a few steps of a tiny model on generated circles."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

from flax_trainer.random_model import ARCHITECTURES
from tests.end_to_end.support.running import (
    start_train_flax,
    start_train_torch,
    train_flax_here,
    train_flax_without_torch,
    train_torch,
    train_torch_here,
)

SIZE = 64
STEPS = 6
BATCH = 8
PROMPT = "red circle with blue background"
TINY = ARCHITECTURES["tiny"]
# A run of it takes three quarters of the time of `tiny`. That has two resolutions, as tests of models and steps need.
ONE_RESOLUTION = dataclasses.replace(
    TINY,
    unet=TINY.unet
    | {
        "block_out_channels": [32],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    },
    text_encoder=TINY.text_encoder | {"num_hidden_layers": 1},
)

TINY_XL = ARCHITECTURES["tiny_xl"]
ONE_RESOLUTION_XL = dataclasses.replace(
    TINY_XL,
    unet=TINY_XL.unet
    | {
        "block_out_channels": [32],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "attention_head_dim": 2,
        "transformer_layers_per_block": 1,
    },
)


@dataclass(frozen=True)
class Backend:
    """How tests run one of the two entry points. `train` is the quickest way, `train_in_a_process` the users'.

    A process of Flax has neither torch nor diffusers, like a TPU VM.
    """

    name: str
    train: Callable[..., str]
    train_in_a_process: Callable[..., str]
    start: Callable[..., Popen[str]]
    describes_device: str
    devices: int = 1


TORCH = Backend("torch", train_torch_here, train_torch, start_train_torch, "1 × cpu (NO)")


# The quickest way is in this process: the others are on as many devices, so that their numbers are the same.
_EIGHT = (train_flax_here, partial(train_flax_without_torch, devices=8), partial(start_train_flax, devices=8))


def _on_a_mesh(run: Callable[..., Any]) -> Callable[..., Any]:
    """The ControlNet divided between pairs of devices."""
    return lambda arguments: run([*arguments, "--parallelism", "mesh", "--fsdp_devices", "2"])


FLAX_HERE = Backend("flax", *_EIGHT, "8 × cpu", devices=8)
FLAX_MESH_HERE = Backend("flax-mesh", *map(_on_a_mesh, _EIGHT), "8 × cpu", devices=8)


def arguments(base_model: Path, output_dir: Path, *more: object, devices: int = 1) -> list[str]:
    """The command line; what comes later in `more` wins."""
    return [
        *("--pretrained_model_name_or_path", str(base_model)),
        *("--generated_circles", "24", "--resolution", str(SIZE)),
        *("--train_batch_size", str(BATCH // devices), "--max_train_steps", str(STEPS)),
        *("--learning_rate", "1e-2", "--checkpointing_steps", "2"),
        *("--output_dir", str(output_dir)),
        *map(str, more),
    ]


def begin_from(run: Path, step: int, part: Path) -> None:
    """Make in `part` what a run would have left behind that was killed after `checkpoint-{step}`."""
    part.mkdir()
    shutil.copytree(run / f"checkpoint-{step}", part / f"checkpoint-{step}")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (part / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
