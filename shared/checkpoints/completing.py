"""How a checkpoint gets its name, and loses it: in one move, so that `checkpoint-N` is complete whenever it is there.

checkpoint-N.unfinished          being written, or left by a run that was killed meanwhile
checkpoint-N.replaced            the one that another of the same step is taking the place of
checkpoint-N.deleted.unfinished  being deleted
checkpoint-N….orbax-checkpoint-tmp…  being written by Orbax, before it is one of the others
"""

import logging
import os
import re
from pathlib import Path

from shared.checkpoints.digests import write_digests
from shared.checkpoints.policy import CHECKPOINT_PREFIX, remove
from shared.untrusted import is_inside, shown

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
REPLACED = ".replaced"
WRITTEN_BY_ORBAX = ".orbax-checkpoint-tmp"
_DELETED_BEFORE = "checkpoints.deleted"  # where older versions of the Flax backend put what they were deleting
_REPLACED_NAME = re.compile(rf"({CHECKPOINT_PREFIX}(?:0|[1-9][0-9]{{0,17}})){re.escape(REPLACED)}")


def complete(unfinished: Path, place: Path) -> None:
    """Give a folder, in which all files of a checkpoint are, its digests and then its name.

    A checkpoint that has the name keeps it until the files are safely on disk, and is deleted when the new one has it.
    Killed at any moment, this leaves one of the two; `tidy` gives it back its name where it has none.

    Raises:
        OSError: there is no room, or it cannot be renamed; what had the name has it still.
        UserError: something in the folder is no file.
    """
    write_digests(unfinished)
    for path in unfinished.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if not os.path.lexists(place):
        unfinished.rename(place)
        return
    replaced = place.with_name(place.name + REPLACED)
    remove(replaced)
    place.rename(replaced)
    try:
        unfinished.rename(place)
    except OSError:
        replaced.rename(place)
        raise
    delete(replaced)


def delete(checkpoint: Path) -> None:
    """Its name goes first, so that whatever a killed process leaves of it does not pass for a checkpoint.

    Raises:
        OSError: it cannot be deleted.
    """
    deleted = checkpoint.with_name(f"{checkpoint.name.removesuffix(REPLACED)}.deleted{UNFINISHED}")
    remove(deleted)  # whatever was put there
    remove(checkpoint.rename(deleted))


def tidy(directory: Path) -> None:
    """Bring a folder, which no other run uses now, to where a killed one would have brought it next.

    A checkpoint that had made way for another gets its name back, unless that other one has it. What is unfinished
    stays until a run begins to save: `remove_unfinished`.

    Raises:
        OSError: something cannot be renamed or deleted.
    """
    for replaced, place in replaced_in(directory):
        if os.path.lexists(place):
            delete(replaced)
        else:
            replaced.rename(place)
            logger.info("%s has its name again, which a killed run had taken from it", shown(place))


def remove_unfinished(directory: Path) -> None:
    """Delete what a killed run has not finished writing or deleting.

    Raises:
        OSError: something cannot be deleted.
    """
    for unfinished in (*directory.glob(f"{CHECKPOINT_PREFIX}*{UNFINISHED}"), directory / _DELETED_BEFORE):
        remove(unfinished)


def replaced_in(directory: Path) -> list[tuple[Path, Path]]:
    """The checkpoints that have made way for another, each with the place that it had."""
    if not directory.is_dir():
        return []
    named = ((path, _REPLACED_NAME.fullmatch(path.name)) for path in directory.iterdir())
    return [
        (path, path.with_name(match[1]))
        for path, match in named
        if match is not None and (not path.is_symlink() or is_inside(path, [directory]))
    ]
