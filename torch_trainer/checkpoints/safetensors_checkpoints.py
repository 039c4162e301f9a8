"""Checkpoints of a run: `output_dir/checkpoint-N/`, complete or absent, never half.

They are written beside their place and renamed into it, in the files of `shared.checkpoints.portable`, which the Flax
backend resumes from too; and the Flax backend's own are read here.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file

from shared.checkpoints.completing import UNFINISHED, complete, remove_unfinished
from shared.checkpoints.policy import CHECKPOINT_PREFIX, checkpoints_in
from shared.checkpoints.portable import (
    AVERAGE_FILE,
    CONTROLNET_FOLDER,
    DECODER_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    check_arrays,
    read_average,
    read_optimizer_state,
    read_params,
    read_training_state,
)
from shared.checkpoints.retention import delete_older, mark_timed
from shared.config import TrainConfig
from shared.models.trained_parts import UNET_FOLDER, split_trained, with_unet_prefix
from shared.models.weight_files import DIFFUSERS, write_weights
from shared.outgoing.atomic_files import write_atomically, write_text_atomically
from shared.run.result import SaveWeights
from shared.threads import in_background
from shared.untrusted import shown
from shared.user_errors import UserError
from torch_trainer.base_models import load_unet
from torch_trainer.checkpoints.flax_checkpoint import is_flax_checkpoint, read_flax_checkpoint, read_flax_record
from torch_trainer.distributed.trainable_state import StateTensors, Tensors, TrainableState


class Checkpoints:
    """Saves and restores the ControlNet, the optimizer and the loss scaler of one run folder.

    All processes call `save` and `restore` together; the main one writes, in the background. `keep` is how many
    checkpoints to leave on disk, the newest ones and without timed ones; None leaves all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        controlnet: Any,
        state: TrainableState,
        directory: Path,
        keep: int | None,
    ):
        self._accelerator, self._controlnet, self._state = accelerator, controlnet, state
        self._directory, self._keep = directory, keep
        self._saved_step: int | None = None
        self._writing: Future[None] | None = None
        self._memory: Tensors = {}  # of the copy that is written
        if accelerator.is_main_process:
            with self._explained_failure_to_write():
                remove_unfinished(directory)

    def save(self, step: int, record: dict[str, Any], *, timed: bool = False) -> None:
        """Copy the state and begin to write it as `checkpoint-{step}`, after which what `keep` has no room for goes.

        A `timed` one is deleted as soon as a newer one is complete.

        Raises:
            UserError: the one before could not be written.
        """
        if step == self._saved_step:
            return
        self.wait()
        is_main, scaler = self._accelerator.is_main_process, self._accelerator.scaler
        if is_main or self._state.is_divided:
            tensors = self._state.tensors(self._memory)
        if is_main:
            state = {"step": step, "loss_scaler": None if scaler is None else scaler.state_dict(), "record": record}
            place = self._directory / f"{CHECKPOINT_PREFIX}{step}"
            self._writing = in_background(self._write, place, tensors, state, timed)
        self._saved_step = step

    def wait(self) -> None:
        """Block until the save under way, if any, is on disk.

        Raises:
            UserError: that save failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def restore(self, checkpoint: Path) -> None:
        """Bring the prepared ControlNet, optimizer and loss scaler to where a checkpoint of either backend stands.

        Raises:
            UserError: the checkpoint is damaged or of another kind of run.
        """
        self.wait()
        shapes = self._state.shapes()
        if is_flax_checkpoint(checkpoint):
            step, params, moments, loss_scaler, average = read_flax_checkpoint(checkpoint, shapes)
        else:
            saved = read_training_state(checkpoint)
            step, loss_scaler = saved["step"], dict[str, Any](saved["loss_scaler"] or {})
            check_arrays(checkpoint, shapes)
            params = dict(read_params(checkpoint))
            average = dict(read_average(checkpoint))
            moments = {}
            for kind, name, value in read_optimizer_state(checkpoint):
                moments.setdefault(name, {})[kind] = value
        self._state.load(
            StateTensors(
                _as_tensors(params),
                {name: _as_tensors(kinds) for name, kinds in moments.items()},
                _as_tensors(average),
            ),
            step,
        )
        scaler = self._accelerator.scaler
        if scaler is not None and loss_scaler:
            scaler.load_state_dict(scaler.state_dict() | loss_scaler)
        if checkpoint.parent.resolve() == self._directory.resolve():
            self._saved_step = step

    def _write(self, place: Path, tensors: StateTensors, state: dict[str, Any], timed: bool) -> None:
        unfinished = place.with_name(f"{place.name}{UNFINISHED}")
        with self._explained_failure_to_write():
            self._write_files(unfinished, tensors, state)
            if timed:
                mark_timed(unfinished)
            complete(unfinished, place)
            delete_older(place, self._keep)

    def _write_files(self, folder: Path, tensors: StateTensors, state: dict[str, Any]) -> None:
        controlnet = self._accelerator.unwrap_model(self._controlnet)
        params, decoder = split_trained(tensors.params)
        save_model(folder / CONTROLNET_FOLDER, controlnet, ControlNetModel, params)
        if decoder:
            write_atomically(folder / DECODER_FILE, lambda path: save_file(with_unet_prefix(decoder), path))
        flat = {f"{kind}.{name}": value for name, kinds in tensors.optimizer.items() for kind, value in kinds.items()}
        write_atomically(folder / OPTIMIZER_FILE, lambda path: save_file(flat, path))
        if tensors.average:
            write_atomically(folder / AVERAGE_FILE, lambda path: save_file(tensors.average, path))
        write_text_atomically(folder / STATE_FILE, json.dumps(state, indent=2) + "\n")

    @contextmanager
    def _explained_failure_to_write(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            complete = ", ".join(path.name for path in checkpoints_in(self._directory)) or "none"
            raise UserError(
                f"A checkpoint could not be written to {shown(self._directory)} ({shown(error)}). Complete checkpoints "
                f"there: {shown(complete)}. If the disk is full, free some space or keep fewer with "
                "--checkpoints_total_limit; then continue with --resume_from_checkpoint latest."
            ) from error


def result_to_save(config: TrainConfig, controlnet: Any, params: Tensors) -> Mapping[str, SaveWeights]:
    """How to write the ControlNet and, where its decoder was trained, the UNet into a folder, in diffusers' layout.

    Writing the UNet raises UserError where the base model cannot be read any more.
    """
    controlnet_params, decoder = split_trained(params)

    def save_controlnet(folder: Path) -> None:
        save_model(folder, controlnet, ControlNetModel, controlnet_params)

    def save_unet(folder: Path) -> None:
        unet = load_unet(config)  # again: in memory the rest of it may be rounded
        save_model(folder / UNET_FOLDER, unet, UNet2DConditionModel, dict(unet.named_parameters()) | decoder)

    decoders: dict[str, SaveWeights] = {"the UNet": save_unet} if decoder else {}
    return {"the ControlNet": save_controlnet, **decoders}


def save_model(folder: Path, model: Any, model_class: Any, params: Mapping[str, torch.Tensor]) -> None:
    """Write whole weights and the model's configuration, in diffusers' layout.

    The model's own `save_pretrained` writes what it holds itself: under FSDP a part, under DeepSpeed rounded copies;
    and FSDP has given its class another name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(model.to_json_string()) | {"_class_name": model_class.__name__}
    write_text_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    arrays: dict[str, Any] = {name: value.detach().numpy() for name, value in params.items()}
    write_weights(folder, arrays, DIFFUSERS, None, None)


def checkpoint_record_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint of either backend says about the run it belongs to.

    Raises:
        UserError: it is damaged, or another program wrote it.
    """
    if is_flax_checkpoint(checkpoint):
        return read_flax_record(checkpoint)
    return {**read_training_state(checkpoint)["record"]}


def _as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
