"""A run's folder: made before anything costs time, finished with a report."""

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.checkpoints.completing import tidy
from shared.config import TrainConfig, to_yaml
from shared.config.public import public_config
from shared.models.trained_parts import UNET_FOLDER
from shared.models.weight_files import DIFFUSERS
from shared.outgoing.atomic_files import remove_unfinished_files, write_text_atomically
from shared.run.lock import run_lock
from shared.untrusted import read_json, shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"
RUN_CONFIG = "config.yaml"
WEIGHTS_FILE = f"{DIFFUSERS.safetensors}.safetensors"
"""The trained ControlNet."""

NOT_WRITTEN = "not_written"
"""In the report, the names of what could not be written."""
_UPLOADED = "uploaded"

# What a run reads, and its own files would overwrite or be taken for.
_INPUTS = (
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "controlnet_model_name_or_path",
    "tokenizer_name",
    "train_data_dir",
    "dataset_name",
    "cached_data",
)
_PARTS_OF_A_MODEL = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


@contextmanager
def held_run_folder(config: TrainConfig) -> Iterator[None]:
    """Make `--output_dir`, keep other runs out of it, and put right what a killed one was just renaming or writing.

    Raises:
        UserError: as `make_run_folder`, or another run is in it.
    """
    folder = make_run_folder(config)
    with run_lock(folder):
        try:
            tidy(folder)
            for written in (folder, folder / UNET_FOLDER, *folder.glob("validation/*")):
                remove_unfinished_files(written)
        except OSError as error:
            raise UserError(
                f"What a killed run was replacing or writing in {shown(folder)} cannot be renamed or deleted "
                f"({shown(error)}). Do it by hand, or choose another --output_dir."
            ) from error
        yield


def make_run_folder(config: TrainConfig) -> Path:
    """`--output_dir`, made where missing.

    Raises:
        UserError: it cannot be made or written to, or is the folder of something that the run reads.
    """
    folder = Path(config.output_dir)
    _check_apart_from_inputs(config, folder)
    make_output_folder(folder)
    return folder


def make_output_folder(folder: Path) -> None:
    """`--output_dir` of any command, made where missing.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(
            f"--output_dir {shown(folder)} cannot be made: {getattr(error, 'strerror', None) or shown(error)}. Choose "
            "a folder that you may write to."
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {shown(folder)} cannot be written to. Choose a folder that you may write to.")


def entries_of_output_folder(folder: Path) -> set[str]:
    """The names of what is in `--output_dir` of any command, which is made where missing.

    Raises:
        UserError: it cannot be made, read or written to.
    """
    make_output_folder(folder)
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise UserError(
            f"--output_dir {shown(folder)} cannot be read: {error.strerror}. Choose a folder that you may read."
        ) from error


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write `config.yaml`, for the user's eyes only where addresses in it hold credentials.

    Raises:
        UserError: it cannot be written.
    """
    path = folder / RUN_CONFIG
    try:
        write_text_atomically(path, to_yaml(config), private=public_config(config) != config)
    except OSError as error:
        raise UserError(
            f"{shown(path)} cannot be written ({error.strerror}). If the disk is full, free some space; or choose "
            "another --output_dir."
        ) from error


def finished_steps(folder: Path) -> int | None:
    """After how many steps a run has left its result in the folder: its report says so. None where none has.

    Raises:
        UserError: there is a report that is none.
    """
    report = folder / REPORT_FILE
    if not report.is_file():
        return None
    said: dict[str, Any] = read_json(report, fix="Delete it: the run then ends once more and writes another.")
    return said["steps"] if type(said.get("steps")) is int and NOT_WRITTEN not in said else None


def is_finished(folder: Path, last_step: int, resumed_at: int) -> bool:
    """Whether the folder holds the result of the run that stands at its last step.

    Raises:
        UserError: as `finished_steps`.
    """
    return resumed_at >= last_step and finished_steps(folder) == last_step


def check_no_result(folder: Path) -> None:
    """Whether a run that begins anew would overwrite what another has trained.

    Raises:
        UserError: the folder holds a ControlNet, or the report of a finished run.
    """
    found = [name for name in (WEIGHTS_FILE, REPORT_FILE) if os.path.lexists(folder / name)]
    if WEIGHTS_FILE in found or finished_steps(folder) is not None:
        raise UserError(
            f"--output_dir {shown(folder)} already holds a trained ControlNet ({', '.join(found)}), which this run "
            "would overwrite. Choose another --output_dir, or move or delete those files."
        )


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json`, whole or not at all. JSON has no NaN or infinity: such a figure is written as null.

    Raises:
        OSError: it cannot be written.
    """
    figures = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in report.items()
    }
    write_text_atomically(folder / REPORT_FILE, json.dumps(figures, indent=2, allow_nan=False) + "\n")


def note_upload(folder: Path, address: str) -> None:
    """Write into `report.json` where the run was uploaded to, so that the same command does not do it again."""
    try:
        write_report(folder, {**read_json(folder / REPORT_FILE, fix="Delete it."), _UPLOADED: address})
    except OSError as error:
        logger.warning("%s cannot say that the run is uploaded (%s)", shown(folder / REPORT_FILE), error.strerror)


def is_uploaded(folder: Path) -> bool:
    """Whether the report of the finished run in the folder says so."""
    said: dict[str, Any] = read_json(folder / REPORT_FILE, fix="Delete it.")
    return _UPLOADED in said


def _check_apart_from_inputs(config: TrainConfig, folder: Path) -> None:
    for name in _INPUTS:
        value = getattr(config, name)
        if value is None:
            continue
        parts = _PARTS_OF_A_MODEL if name == "pretrained_model_name_or_path" else ()
        if any(_same_folder(folder, place) for place in (Path(value), *(Path(value) / part for part in parts))):
            raise UserError(
                f"--output_dir {shown(folder)} is the folder that --{name} reads, whose files the run's own would "
                "mix with or overwrite. Choose another --output_dir."
            )
    for shard in config.train_shards or ():
        place = shard.removeprefix("file://").removeprefix("file:")
        if "://" not in place and "pipe:" not in place and _same_folder(folder, Path(place).parent):
            raise UserError(
                f"--output_dir {shown(folder)} is the folder of --train_shards, whose files the run's own would mix "
                "with. Choose another --output_dir."
            )


def _same_folder(one: Path, other: Path) -> bool:
    """Whether both are there and the same, whatever links lead to them."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):  # not there, or the name of something on the Hub; ValueError: a NUL
        return False
