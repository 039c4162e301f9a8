"""Orbax checkpoints of a run: `output_dir/checkpoint-N/`, complete or absent, never half.

A checkpoint holds the trainable state (ControlNet, optimizer moments, step) as arrays under PyTorch's parameter names,
and a JSON record of what it belongs to: the configuration, the data's manifest, the global batch size.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from flax_trainer.checkpoints.orbax_places import DashedNames, PathWithDigests, Retention
from flax_trainer.training.loss_scaling import initial_loss_scaler
from flax_trainer.training.state import TrainState
from shared.checkpoints.arrays import Layout, check_layouts
from shared.checkpoints.completing import WRITTEN_BY_ORBAX, remove_unfinished
from shared.checkpoints.orbax_files import open_arrays, read_record
from shared.checkpoints.policy import (
    CHECKPOINT_PREFIX,
    RESUME_FROM_ANOTHER,
    check_step,
    checkpoint_step,
    checkpoints_in,
)
from shared.threads import leave_behind
from shared.untrusted import shown
from shared.user_errors import UserError

_LOSS_SCALER = "loss_scaler"


class Checkpoints:
    """Saves, in the background, and restores the checkpoints of one run folder.

    Of several processes, all make the same calls; they share the folder, and each writes what only it has.
    """

    def __init__(self, directory: Path, *, keep: int | None, read_only: bool = False):
        """`keep` is how many to leave on disk, the newest ones and without timed ones; None leaves all.

        Unless `read_only`, what a killed run left unfinished in the folder is deleted.
        """
        self._directory = directory.absolute()
        self._saved_step: int | None = None
        self._step_names = DashedNames()
        self._retention = Retention(keep)
        self._writer = None if read_only else self._make_writer()

    def _make_writer(self) -> ocp.CheckpointManager:
        _keep_quiet_about_given_up_writes()
        for logger in ("absl", "asyncio"):  # Orbax logs there what it then raises, and every write it gave up
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            step_name_format=self._step_names,
            temporary_path_class=PathWithDigests.keeping(self._retention),
            # A checkpoint of the step that is saved would otherwise be deleted first.
            file_options=ocp.options.FileOptions(skip_sync_file_validations=True),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        handlers = {"state": _state_handler(), "record": ocp.JsonCheckpointHandler()}
        with self._explained_failure_to_write():
            if jax.process_index() == 0:
                remove_unfinished(self._directory)
            self._remove_what_is_no_folder()
            return ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def save(self, state: TrainState, record: dict[str, Any], *, timed: bool = False) -> None:
        """Start saving a state as `checkpoint-{state.step}`; the writing goes on in the background.

        numpy arrays, of which all processes have equal ones, are written by the first, and must stay as they are until
        `wait` has returned. Of arrays that are divided between devices, every process writes its part; they are copied
        before this returns, and may then be donated. A `timed` one is deleted as soon as a newer one is complete.

        A checkpoint of that step, which a run that was resumed from an older one comes across, is there until the new
        one is complete.

        Raises:
            UserError: this save cannot begin, or the one before it failed.
        """
        assert self._writer is not None, "this folder is only read"
        step = int(state.step)
        if step == self._saved_step:
            return
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state.to_checkpoint()), record=ocp.args.JsonSave(record))
        self.wait()
        self._retention.is_timed = timed
        with self._explained_failure_to_write():
            if step in self._writer.all_steps():
                self._step_names.replaced_step = step
                self._writer.reload()
                self._step_names.replaced_step = None
            self._writer.save(step, args=items, force=True)
        self._saved_step = step

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `checkpoint-{step}` as numpy arrays; `like` gives the names, shapes and dtypes expected.

        Raises:
            UserError: the checkpoint is damaged, or holds other parameters than `like`.
        """
        path = self._path(step)
        with self._explained_failure_to_read(step):
            stored = open_arrays(path)
        check_moments(path, in_eight_bits=any(name.startswith("mu_scales/") for name in stored.layouts), like=like)
        check_layouts(path, stored.layouts, _expected_of(stored.layouts, like))
        with self._explained_failure_to_read(step):
            arrays = stored.read()
        check_step(path, int(arrays["step"]))
        return TrainState.from_checkpoint(_as_tree(arrays)).with_loss_scaler_of(like)

    def record(self, step: int) -> dict[str, Any]:
        """Only the JSON record of `checkpoint-{step}`.

        Raises:
            UserError: the checkpoint is damaged.
        """
        with self._explained_failure_to_read(step):
            return {**read_record(self._path(step))}

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return [checkpoint_step(path) for path in checkpoints_in(self._directory)]

    def wait(self) -> None:
        """Block until the save under way, if any, is on disk.

        Raises:
            UserError: that save failed.
        """
        if self._writer is not None:
            with self._explained_failure_to_write():
                self._writer.wait_until_finished()

    def close(self) -> None:
        """Wait for the save under way, if any, and release the folder; raises as `wait` does."""
        if self._writer is not None:
            with self._explained_failure_to_write():
                self._writer.close()

    def _remove_what_is_no_folder(self) -> None:
        """Orbax deletes unfinished checkpoints as folders, which a link or a file of such a name is not."""
        if jax.process_index() == 0 and self._directory.is_dir():
            for path in self._directory.glob(f"{CHECKPOINT_PREFIX}*{WRITTEN_BY_ORBAX}*"):
                if path.is_symlink() or not path.is_dir():
                    path.unlink()

    def _path(self, step: int) -> Path:
        return self._directory / f"{CHECKPOINT_PREFIX}{step}"

    def _names(self) -> list[str]:
        return [path.name for path in checkpoints_in(self._directory)]

    @contextmanager
    def _explained_failure_to_read(self, step: int) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            others = ", ".join(name for name in self._names() if name != self._path(step).name) or "none"
            reason = str(error).removesuffix(RESUME_FROM_ANOTHER).rstrip(" .")
            raise UserError(
                f"{shown(self._path(step))} cannot be read: it is damaged, or another program wrote it "
                f"({reason}). Move it elsewhere and resume from another checkpoint (there: {shown(others)})."
            ) from error

    @contextmanager
    def _explained_failure_to_write(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            leave_behind()  # where its folder could not be made, Orbax's threads wait for that for ten minutes
            complete = ", ".join(self._names()) or "none"
            raise UserError(
                f"A checkpoint could not be written to {shown(self._directory)} ({_short(error)}). Complete "
                f"checkpoints there: {shown(complete)}. If the disk is full, free some space or keep fewer with "
                "--checkpoints_total_limit; then continue with --resume_from_checkpoint latest."
            ) from error


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes arrays from where they lie: of copies on several devices, the first one.

    Orbax by itself would have each of those devices cut out and write a part, which takes memory there, and for every
    shape a program to compile. And it would copy what lies on the host once more, while the training waits.
    """
    from_devices = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    from_host = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, from_devices), (np.ndarray, from_host))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _keep_quiet_about_given_up_writes() -> None:
    """When one write of a save fails, Orbax no longer listens when the others end, which is an error for each.

    They may end after the folder is released, so this stays until the process ends.
    """
    if not isinstance(sys.unraisablehook, _QuietAboutGivenUpWrites):
        sys.unraisablehook = _QuietAboutGivenUpWrites(sys.unraisablehook)


class _QuietAboutGivenUpWrites:
    def __init__(self, hook: "Callable[[sys.UnraisableHookArgs], Any]"):
        self._hook = hook

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)


def check_moments(checkpoint: Path, *, in_eight_bits: bool, like: TrainState) -> None:
    """Raises UserError where a checkpoint stores the optimizer's moments otherwise than `like` does."""
    if in_eight_bits != bool(like.mu_scales):
        raise UserError(
            f"{shown(checkpoint)} was saved {'with' if in_eight_bits else 'without'} --use_8bit_adam, and the "
            f"optimizer's state is not converted. {'Add' if in_eight_bits else 'Leave out'} that flag to resume."
        )


def check_same_arrays(checkpoint: Path, saved: TrainState, like: TrainState) -> None:
    """Raises UserError where a saved state has other names, shapes or dtypes than `like`."""
    check_layouts(checkpoint, _layouts(saved), _layouts(like))


def _expected_of(saved: Mapping[str, Layout], like: TrainState) -> dict[str, Layout]:
    """The precision may have changed, and with it whether there is a loss scaler."""
    scales_loss = any(name.startswith(f"{_LOSS_SCALER}/") for name in saved)
    return _layouts(like._replace(loss_scaler=initial_loss_scaler() if scales_loss else {}))


def _layouts(state: TrainState) -> dict[str, Layout]:
    """Of every array by its path, such as `params/conv_in.weight`."""
    leaves = jax.tree_util.tree_leaves_with_path(state.to_checkpoint())
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): Layout(str(leaf.dtype), tuple(leaf.shape))
        for path, leaf in leaves
    }


def _as_tree(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of their paths."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        part, _, name = path.partition("/")
        if name:
            tree.setdefault(part, {})[name] = array
        else:
            tree[part] = array
    return tree


def _short(error: Exception) -> str:
    """What TensorStore says, without the specification of every driver that it appends."""
    beginning = (str(error).splitlines() or [""])[0].partition(" [tensorstore_spec")[0]
    return f"{type(error).__name__}: {shown(beginning)}"
