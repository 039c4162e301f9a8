"""Which checkpoints a run deletes when another one is complete.

checkpoint-N/timed.txt  in those that --checkpointing_seconds asked for
"""

from pathlib import Path

from shared.checkpoints.completing import delete
from shared.checkpoints.policy import checkpoint_step, checkpoints_in

TIMED_FILE = "timed.txt"

_NOTE = (
    "Saved because of --checkpointing_seconds: the run deletes this checkpoint as soon as a newer one is complete.\n"
)


def mark_timed(unfinished: Path) -> None:
    """Say of a checkpoint, in which all files but its digests are, that it goes when a newer one is complete.

    Raises:
        OSError: there is no room.
    """
    (unfinished / TIMED_FILE).write_text(_NOTE)


def is_timed(checkpoint: Path) -> bool:
    """Whether a checkpoint of either backend is marked so."""
    path = checkpoint / TIMED_FILE
    return path.is_file() and not path.is_symlink()


def delete_older(completed: Path, keep: int | None) -> None:
    """Delete every timed checkpoint but `completed`, and of the others all but the newest `keep`; None leaves all.

    The newest are those saved last: one of a later step is older, of a course that the run has left.

    Raises:
        OSError: one cannot be deleted.
    """
    checkpoints = checkpoints_in(completed.parent)
    checkpoints.sort(key=lambda path: (checkpoint_step(path) <= checkpoint_step(completed), checkpoint_step(path)))
    timed = [path for path in checkpoints if is_timed(path)]
    others = [path for path in checkpoints if path not in timed]
    for path in [path for path in timed if path != completed] + (others[:-keep] if keep else []):
        delete(path)
