"""Checkpoints of a run: `output_dir/checkpoint-N/`, complete or absent, never half.

They are written beside their place and renamed into it. Where every process holds the whole state, they are those of
`shared.portable_checkpoint`, which the Flax backend resumes from too; where it is sharded (DeepSpeed, FSDP), the
optimizer's part is in accelerate's own format.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from shared.checkpoint_policy import CHECKPOINT_PREFIX, checkpoints_in
from shared.model_files.weight_files import DIFFUSERS, read_weights
from shared.portable_checkpoint import (
    CONTROLNET_FOLDER,
    OPTIMIZER_FILE,
    STATE_FILE,
    is_portable,
    read_optimizer_state,
    read_training_state,
)
from torch_trainer.accelerator import is_sharded
from torch_trainer.flax_checkpoint import is_flax_checkpoint, read_flax_checkpoint, read_flax_record

_SHARDED_FOLDER = "accelerate"
_ADAMW_KINDS = {"exp_avg", "exp_avg_sq"}


class Checkpoints:
    """Saves and restores the ControlNet, the optimizer and the loss scaler of one run folder.

    All processes call `save` and `restore` together. `keep` is how many checkpoints to leave on disk, the newest ones;
    None leaves all.
    """

    def __init__(self, accelerator: Accelerator, controlnet: Any, optimizer: Any, directory: Path, keep: int | None):
        self._accelerator, self._controlnet, self._optimizer = accelerator, controlnet, optimizer
        self._directory, self._keep = directory, keep
        self._saved_step: int | None = None
        if accelerator.is_main_process:
            for unfinished in directory.glob(f"{CHECKPOINT_PREFIX}*.unfinished"):
                shutil.rmtree(unfinished)

    def save(self, step: int, record: dict[str, Any]) -> None:
        """Write `checkpoint-{step}`, then delete what `keep` leaves no room for.

        Raises:
            ValueError: it could not be written.
        """
        if step == self._saved_step:
            return
        accelerator, place = self._accelerator, self._directory / f"{CHECKPOINT_PREFIX}{step}"
        unfinished = place.with_name(f"{place.name}.unfinished")
        with self._explained_failure_to_write():
            if is_sharded(accelerator):
                accelerator.save_state(str(unfinished / _SHARDED_FOLDER))
            if accelerator.is_main_process:
                self._write(unfinished, step, record)
                _put_in_place(unfinished, place)
                for old in checkpoints_in(self._directory)[: -self._keep] if self._keep else []:
                    shutil.rmtree(old)
        self._saved_step = step

    def restore(self, checkpoint: Path) -> None:
        """Bring the prepared ControlNet, optimizer and loss scaler to where a checkpoint of either backend stands.

        Raises:
            ValueError: the checkpoint is damaged or of another kind of run.
        """
        if is_flax_checkpoint(checkpoint):
            self._refuse_for_sharded(checkpoint)
            step, params, moments = read_flax_checkpoint(checkpoint)
            self._load_params(checkpoint, params)
            self._load_optimizer(checkpoint, moments, step)
        elif is_portable(checkpoint):
            self._refuse_for_sharded(checkpoint)
            saved = read_training_state(checkpoint)
            self._load_params(checkpoint, dict(read_weights(checkpoint / CONTROLNET_FOLDER, DIFFUSERS, None)))
            state: dict[str, dict[str, np.ndarray]] = {}
            for kind, name, value in read_optimizer_state(checkpoint):
                state.setdefault(name, {})[kind] = value
            self._load_optimizer(checkpoint, state, saved["step"])
            if self._accelerator.scaler is not None and saved["loss_scaler"] is not None:
                self._accelerator.scaler.load_state_dict(saved["loss_scaler"])
        elif (checkpoint / _SHARDED_FOLDER).is_dir() and is_sharded(self._accelerator):
            self._accelerator.load_state(str(checkpoint / _SHARDED_FOLDER))
        else:
            raise ValueError(
                f"{checkpoint} cannot be resumed here: it was saved by sharded processes (DeepSpeed or FSDP) or by "
                "another program. Resume with the accelerate configuration that it was saved with."
            )

    def _refuse_for_sharded(self, checkpoint: Path) -> None:
        if is_sharded(self._accelerator):
            raise ValueError(
                f"{checkpoint} was saved without DeepSpeed or FSDP and cannot be resumed with them. Resume without, or "
                f"start anew with --controlnet_model_name_or_path {checkpoint / CONTROLNET_FOLDER}."
            )

    def _write(self, folder: Path, step: int, record: dict[str, Any]) -> None:
        scaler = self._accelerator.scaler
        if not is_sharded(self._accelerator):
            controlnet = self._accelerator.unwrap_model(self._controlnet)
            controlnet.save_pretrained(folder / CONTROLNET_FOLDER)
            save_file(_optimizer_tensors(controlnet, self._optimizer.optimizer), folder / OPTIMIZER_FILE)
        state = {
            "step": step,
            "loss_scaler": None if scaler is None else scaler.state_dict(),
            "record": record,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def _load_params(self, checkpoint: Path, params: dict[str, np.ndarray]) -> None:
        own = dict(self._accelerator.unwrap_model(self._controlnet).named_parameters())
        differences = [
            f"{name}: {_shape(params.get(name))} in the checkpoint, {_shape(own.get(name))} expected"
            for name in sorted({*own, *params})
            if _shape(params.get(name)) != _shape(own.get(name))
        ]
        if differences:
            raise ValueError(
                f"{checkpoint} belongs to a ControlNet of another architecture; {len(differences)} arrays differ:\n  "
                + "\n  ".join(differences[:5])
                + "\nGive the base model of the checkpoint, or start a new run in another --output_dir."
            )
        with torch.no_grad():
            for name, param in own.items():
                param.copy_(torch.from_numpy(params[name]))

    def _load_optimizer(self, checkpoint: Path, state: dict[str, dict[str, np.ndarray]], step: int) -> None:
        optimizer = self._optimizer.optimizer
        is_adamw = isinstance(optimizer, torch.optim.AdamW)
        if is_adamw != all(kinds.keys() >= _ADAMW_KINDS for kinds in state.values()):
            raise ValueError(
                f"{checkpoint} was saved {'with' if is_adamw else 'without'} --use_8bit_adam, and the optimizer's "
                f"state cannot be converted. {'Add' if is_adamw else 'Leave out'} that flag to resume."
            )
        # named_parameters' order is that in which the optimizer was given the parameters and numbers them
        own = self._accelerator.unwrap_model(self._controlnet).named_parameters()
        entries: dict[int, dict[str, Any]] = {
            index: {kind: _in_memory_order_of(param, torch.from_numpy(value)) for kind, value in state[name].items()}
            | {"step": torch.tensor(float(step)) if is_adamw else step}
            for index, (name, param) in enumerate(own)
        }
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})

    @contextmanager
    def _explained_failure_to_write(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            complete = ", ".join(path.name for path in checkpoints_in(self._directory)) or "none"
            raise ValueError(
                f"A checkpoint could not be written to {self._directory} ({error}). Complete checkpoints there: "
                f"{complete}. If the disk is full, free some space or keep fewer with --checkpoints_total_limit; then "
                "continue with --resume_from_checkpoint latest."
            ) from error


def checkpoint_record_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint of either backend says about the run it belongs to.

    Raises:
        ValueError: it is damaged, or another program wrote it.
    """
    if is_flax_checkpoint(checkpoint):
        return read_flax_record(checkpoint)
    return read_training_state(checkpoint)["record"]


def _optimizer_tensors(controlnet: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of the optimizer's state as `kind.parameter`; the count of steps is the checkpoint's own."""
    return {
        f"{kind}.{name}": value.detach().cpu().contiguous()
        for name, param in controlnet.named_parameters()
        for kind, value in optimizer.state[param].items()
        if isinstance(value, torch.Tensor) and kind != "step"
    }


def _in_memory_order_of(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value with the parameter's strides, as the optimizer itself allocates its moments."""
    return torch.empty_like(param, dtype=value.dtype).copy_(value) if value.shape == param.shape else value


def _shape(array: np.ndarray | torch.Tensor | None) -> str:
    return "nothing" if array is None else str(list(array.shape))


def _put_in_place(unfinished: Path, place: Path) -> None:
    """Rename a folder whose files are safely on disk; one of that name, of a run resumed from earlier, makes way."""
    for path in unfinished.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if place.exists():
        shutil.rmtree(place)
    unfinished.rename(place)
