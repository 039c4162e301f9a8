"""Orbax checkpoints of a run: `output_dir/checkpoint-N/`, complete or absent, never half.

A checkpoint holds the trainable state (ControlNet, optimizer moments, step) as arrays under PyTorch's parameter names,
and a JSON record of what it belongs to: the configuration, the data's manifest, the global batch size.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import step as step_lib

from flax_trainer.state import TrainState
from shared.checkpoint_policy import CHECKPOINT_PREFIX


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
    """Saves, in the background, and restores the checkpoints of one run folder."""

    def __init__(self, directory: Path, *, keep: int | None):
        """`keep` is how many to leave on disk, the newest ones; None leaves all."""
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                step_name_format=_DashedNames(),
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
            item_names=("state", "record"),
        )

    def save(self, state: TrainState, record: dict[str, Any]) -> None:
        """Start saving a state of numpy arrays as `checkpoint-{state.step}`; the writing goes on in the background.

        It replaces a checkpoint of that step, which a run that was resumed from an older one comes across.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            self._manager.delete(step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state.to_checkpoint()), record=ocp.args.JsonSave(record)
            ),
            force=True,
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `checkpoint-{step}` as numpy arrays; `like` gives the names, shapes and dtypes expected."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like.to_checkpoint()))
        )
        return TrainState.from_checkpoint(restored.state)

    def record(self, step: int) -> dict[str, Any]:
        """Only the JSON record of `checkpoint-{step}`."""
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Block until the save under way, if any, is on disk; raises what it raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
