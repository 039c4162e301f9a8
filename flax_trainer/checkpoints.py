"""Orbax checkpoints of a run: `output_dir/checkpoint-N/`, complete or absent, never half.

A checkpoint holds the trainable state (ControlNet, optimizer moments, step) as arrays under PyTorch's parameter names,
and a JSON record of what it belongs to: the configuration, the data's manifest, the global batch size.
"""

import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import step as step_lib

from flax_trainer.state import TrainState
from shared.checkpoint_policy import CHECKPOINT_PREFIX, checkpoints_in

_DIFFERENCES_SHOWN = 5
# Deleting takes time, and half of a checkpoint must not pass for one: it is first moved here.
_DELETED = "checkpoints.deleted"


class _DashedNames(step_lib.NameFormat[step_lib.Metadata]):
    """`checkpoint-N`, the name every diffusers script uses; Orbax's own formats put an underscore there."""

    def build_name(self, step: int) -> str:
        return f"{CHECKPOINT_PREFIX}{step}"

    def find_all(self, base_path: epath.PathLike) -> Iterator[step_lib.Metadata]:
        for path in epath.Path(base_path).iterdir():
            match = re.fullmatch(rf"{CHECKPOINT_PREFIX}(\d+)", path.name)
            if match and step_lib.is_path_finalized(path):
                yield step_lib.Metadata(step=int(match[1]), path=path)

    def find_step(self, base_path: epath.PathLike, step: int) -> step_lib.Metadata:
        path = epath.Path(base_path) / self.build_name(step)
        if not (path.exists() and step_lib.is_path_finalized(path)):
            raise ValueError(f"there is no complete checkpoint at {path}")
        return step_lib.Metadata(step=step, path=path)


class Checkpoints:
    """Saves, in the background, and restores the checkpoints of one run folder.

    Of several processes, all make the same calls; they share the folder, and each writes what only it has.
    """

    def __init__(self, directory: Path, *, keep: int | None, read_only: bool = False):
        """`keep` is how many to leave on disk, the newest ones; None leaves all.

        Unless `read_only`, what a killed run left unfinished in the folder is deleted.
        """
        self._directory = directory.absolute()
        self._read_only = read_only
        self._saved_step: int | None = None
        options = ocp.CheckpointManagerOptions(
            step_name_format=_DashedNames(),
            max_to_keep=keep,
            todelete_subdir=_DELETED,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
            read_only=read_only,
        )
        self._empty_deleted()
        _keep_quiet_about_given_up_writes()
        for logger in ("absl", "asyncio"):  # Orbax logs there what it then raises, and every write it gave up
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        handlers = {"state": _state_handler(), "record": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def save(self, state: TrainState, record: dict[str, Any]) -> None:
        """Start saving a state as `checkpoint-{state.step}`; the writing goes on in the background.

        numpy arrays, of which all processes have equal ones, are written by the first. Of arrays that are divided
        between devices, every process writes its part; they are copied before this returns, and may then be donated.
        It replaces a checkpoint of that step, which a run that was resumed from an older one comes across.

        Raises:
            ValueError: this save cannot begin, or the one before it failed.
        """
        step = int(state.step)
        if step == self._saved_step:
            return
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state.to_checkpoint()), record=ocp.args.JsonSave(record))
        self.wait()
        with self._explained_failure_to_write():
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(step, args=items, force=True)
        self._saved_step = step

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `checkpoint-{step}` as numpy arrays; `like` gives the names, shapes and dtypes expected.

        Raises:
            ValueError: the checkpoint is damaged, or holds other parameters than `like`.
        """
        saved = TrainState.from_checkpoint(self._read_state(step))
        state = saved.with_loss_scaler_of(like)
        check_same_arrays(self._path(step), state, like)
        return state

    def record(self, step: int) -> dict[str, Any]:
        """Only the JSON record of `checkpoint-{step}`.

        Raises:
            ValueError: the checkpoint is damaged.
        """
        return self._read(step, "record", ocp.args.JsonRestore())

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Block until the save under way, if any, is on disk.

        Raises:
            ValueError: that save failed.
        """
        with self._explained_failure_to_write():
            self._manager.wait_until_finished()
            self._empty_deleted()

    def close(self) -> None:
        """Wait for the save under way, if any, and release the folder; raises as `wait` does."""
        with self._explained_failure_to_write():
            self._manager.close()
            self._empty_deleted()

    def _empty_deleted(self) -> None:
        deleted = self._directory / _DELETED
        if not self._read_only and jax.process_index() == 0 and deleted.exists():
            shutil.rmtree(deleted)

    def _path(self, step: int) -> Path:
        return self._directory / f"{CHECKPOINT_PREFIX}{step}"

    def _names(self) -> list[str]:
        return [path.name for path in checkpoints_in(self._directory)]

    def _read(self, step: int, item: str, how: ocp.args.CheckpointArgs) -> Any:
        with self._explained_failure_to_read(step):
            return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]

    def _read_state(self, step: int) -> Any:
        """Every array whole, as numpy, however many devices it was divided between when it was saved."""
        with self._explained_failure_to_read(step):
            saved = self._manager.item_metadata(step)["state"]
            if saved is None:
                raise ValueError("nothing says which arrays it holds")
            as_numpy = jax.tree.map(lambda array: np.broadcast_to(np.zeros((), array.dtype), array.shape), saved.tree)
        how = ocp.checkpoint_utils.construct_restore_args(as_numpy)
        return self._read(step, "state", ocp.args.PyTreeRestore(as_numpy, restore_args=how))

    @contextmanager
    def _explained_failure_to_read(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, OSError) as error:
            others = ", ".join(name for name in self._names() if name != self._path(step).name) or "none"
            raise ValueError(
                f"{self._path(step)} cannot be read: it is damaged, or another program wrote it "
                f"({_short(error)}). Move it elsewhere and resume from another checkpoint (there: {others})."
            ) from error

    @contextmanager
    def _explained_failure_to_write(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            complete = ", ".join(self._names()) or "none"
            raise ValueError(
                f"A checkpoint could not be written to {self._directory} ({_short(error)}). Complete checkpoints "
                f"there: {complete}. If the disk is full, free some space or keep fewer with "
                "--checkpoints_total_limit; then continue with --resume_from_checkpoint latest."
            ) from error


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes arrays from where they lie: of copies on several devices, the first one.

    Orbax by itself would have each of those devices cut out and write a part, which takes memory there, and for every
    shape a program to compile.
    """
    from_devices = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    from_host = ocp.type_handlers.NumpyHandler()
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


def check_same_arrays(checkpoint: Path, saved: TrainState, like: TrainState) -> None:
    """Raises ValueError where a saved state has other names, shapes or dtypes than `like`."""
    before, now = _layout(saved.to_checkpoint()), _layout(like.to_checkpoint())
    differences = [
        f"{name}: {before.get(name, 'nothing')} in the checkpoint, {now.get(name, 'nothing')} expected"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"{checkpoint} belongs to a ControlNet of another architecture; {len(differences)} arrays differ:\n  "
            + "\n  ".join(differences[:_DIFFERENCES_SHOWN])
            + "\nGive the base model of the checkpoint, or start a new run in another --output_dir."
        )


def _layout(tree: Any) -> dict[str, str]:
    """Type and shape of every array by its path, as `params/conv_in.weight: float32 [3, 3, 4, 320]`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype} {list(leaf.shape)}"
        for path, leaf in leaves
    }


def _short(error: Exception) -> str:
    """What TensorStore says, without the specification of every driver that it appends."""
    return f"{type(error).__name__}: {str(error).splitlines()[0].partition(' [tensorstore_spec')[0]}"
