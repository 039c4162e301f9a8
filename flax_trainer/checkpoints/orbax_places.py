"""Where Orbax writes a checkpoint, and how that becomes `checkpoint-N`."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import step as step_lib

from shared.checkpoints.completing import UNFINISHED, complete
from shared.checkpoints.policy import CHECKPOINT_PREFIX, checkpoint_step, is_checkpoint, remove
from shared.checkpoints.retention import delete_older, mark_timed
from shared.user_errors import UserError


class DashedNames(step_lib.NameFormat[step_lib.Metadata]):
    """`checkpoint-N`, the name every diffusers script uses; Orbax's own formats put an underscore there."""

    replaced_step: int | None = None
    """Of the checkpoint that a save is to take the place of: Orbax would refuse to save one that it knows of."""

    def build_name(self, step: int) -> str:
        return f"{CHECKPOINT_PREFIX}{step}"

    def find_all(self, base_path: epath.PathLike) -> Iterator[step_lib.Metadata]:
        for path in epath.Path(base_path).iterdir():
            if is_checkpoint(Path(path)) and _is_readable(Path(path)) and step_lib.is_path_finalized(path):
                step = checkpoint_step(Path(path))
                if step != self.replaced_step:
                    yield step_lib.Metadata(step=step, path=path)

    def find_step(self, base_path: epath.PathLike, step: int) -> step_lib.Metadata:
        path = epath.Path(base_path) / self.build_name(step)
        if not (path.exists() and step_lib.is_path_finalized(path)):
            raise UserError(f"there is no complete checkpoint at {path}")
        return step_lib.Metadata(step=step, path=path)


@dataclass
class Retention:
    """What to do with a checkpoint that is complete: `is_timed` is of the one under way, `keep` of `delete_older`."""

    keep: int | None
    is_timed: bool = False


class PathWithDigests(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Where Orbax writes a checkpoint until all processes have written what is theirs of it.

    `finalize`, which the first process calls in the background, would then give it its name.
    """

    retention: ClassVar[Retention]

    @classmethod
    def keeping(cls, retention: Retention) -> "type[PathWithDigests]":
        """Orbax makes the instances, of a class that it is given."""
        return type(cls.__name__, (cls,), {"retention": retention})

    async def finalize(self) -> None:
        """Orbax's last files, and then the digests of all; then the older checkpoints go."""
        place = epath.Path(self.get_final())
        unfinished = place.parent / f"{place.name}{UNFINISHED}"
        await asyncio.to_thread(remove, Path(unfinished))  # whatever was put there
        self._final_path = unfinished
        try:
            await super().finalize()
        finally:
            self._final_path = place
        await asyncio.to_thread(self._complete, Path(unfinished), Path(place))

    def _complete(self, unfinished: Path, place: Path) -> None:
        if self.retention.is_timed:
            mark_timed(unfinished)
        complete(unfinished, place)
        delete_older(place, self.retention.keep)


def _is_readable(checkpoint: Path) -> bool:
    """Orbax opens this file of every checkpoint, and would wait for ever at a pipe."""
    path = checkpoint / "_CHECKPOINT_METADATA"
    return not os.path.lexists(path) or (path.is_file() and not path.is_symlink())
