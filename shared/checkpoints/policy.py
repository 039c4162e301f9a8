"""The checkpoints of a run's folder, and whether a run may go on from one: the same rules for both backends."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from shared.config import TrainConfig
from shared.config.learning_rate import Course, change_of_course, course_of
from shared.config.options import FLAGS
from shared.untrusted import is_inside, shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

CHECKPOINT_PREFIX = "checkpoint-"
ABANDONED = ".abandoned"  # what stands behind the name of a checkpoint of a course that was left
RESUME_FROM_ANOTHER = "Resume from another checkpoint."

# Eighteen digits are more steps than there are nanoseconds in thirty years.
_NAME = re.compile(rf"{CHECKPOINT_PREFIX}(0|[1-9][0-9]{{0,17}})")
_DIFFERENCES_SHOWN = 20  # all of an honest run's, which has as many settings

# What decides the content of a global batch or the meaning of the parameters. Everything else (learning rate, steps,
# logging, devices, workers, ...) may change between the parts of a run.
_MUST_MATCH = [name for name, flag in FLAGS.items() if "resume" in flag.must_match]


def _recorded(value: Any) -> Any:
    """A value as checkpoints hold it: one of a list of one by itself, as where the flag took no more than one."""
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


# For checkpoints that are older than one of these flags.
_DEFAULTS = {name: _recorded(FLAGS[name].default) for name in _MUST_MATCH}


_Number = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | float
_Value = _Number | str | bool | None


class Record(TypedDict):
    """What a checkpoint says about the run it belongs to. Versions before the learning rate's part did without it."""

    configuration: dict[str, _Value | list[_Number | str]]
    global_batch_size: Annotated[int, Meta(ge=1, le=2**31)]
    data: dict[str, _Value | list[_Value | list[_Value]]]
    learning_rate: NotRequired[Course]


def checkpoint_step(path: Path) -> int:
    """N of `.../checkpoint-N`."""
    return int(path.name.removeprefix(CHECKPOINT_PREFIX))


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder called `checkpoint-N` (which Orbax's unfinished ones are not).

    A link that leads out of the run's folder is none: what a run deletes and renames is in its own folder.
    """
    return _has_name_and_content(path) and (not path.is_symlink() or is_inside(path, [path.parent]))


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted(filter(is_checkpoint, entries(directory)), key=checkpoint_step)


def entries(directory: Path) -> list[Path]:
    """What is in a folder; nothing where it is not there. Raises UserError where it cannot be read."""
    try:
        return list(directory.iterdir()) if directory.is_dir() else []
    except OSError as error:
        raise UserError(
            f"{shown(directory)} cannot be read ({error.strerror}). Choose a folder that you may read."
        ) from error


def check_no_links_out(paths: Iterable[Path]) -> None:
    """Raises UserError where a link that leads out of its folder has the name of a checkpoint."""
    for path in paths:
        if _has_name_and_content(path) and not is_checkpoint(path):
            raise UserError(
                f"{shown(path)} is a link that leads out of its folder. To resume from what it leads to, give "
                "--resume_from_checkpoint the path of that folder itself, or move it here."
            )


def check_step(checkpoint: Path, step: int) -> None:
    """Raises UserError where a folder called `checkpoint-N` holds the state of another step."""
    if _NAME.fullmatch(checkpoint.name) and checkpoint_step(checkpoint) != step:
        raise UserError(
            f"{shown(checkpoint)} holds the state after step {step}, which its name denies. Give it back the name "
            f"{CHECKPOINT_PREFIX}{step}, or resume from another checkpoint."
        )


def checkpoint_record(
    config: TrainConfig, manifest: dict[str, Any], global_batch_size: int, total_steps: int | None = None
) -> dict[str, Any]:
    """What a checkpoint says about the run it belongs to, exactly as it reads back from JSON (lists, no tuples).

    `total_steps` of the run, where its learning rates are to be kept in mind.
    """
    record = {
        "configuration": {name: _recorded(getattr(config, name)) for name in _MUST_MATCH},
        "global_batch_size": global_batch_size,
        "data": manifest,
    }
    if total_steps is not None:
        record["learning_rate"] = course_of(config, total_steps)
    return json.loads(json.dumps(record))


def check_resumable(checkpoint: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run on other data or with settings that change what its batches are.

    Local data with the same fingerprint may have moved: its `location` is not compared. That the learning rate is to
    take another course is said in the log.

    Raises:
        UserError: naming everything that differs, with both values.
    """
    differences = _differences(saved, current)
    if differences:
        more = len(differences) - _DIFFERENCES_SHOWN
        raise UserError(
            f"{shown(checkpoint)} cannot be resumed by this command, because these differ:\n  "
            + "\n  ".join(differences[:_DIFFERENCES_SHOWN])
            + (f"\n  and {more} more" if more > 0 else "")
            + "\nGive the values of the checkpoint, or start a new run in another --output_dir."
        )
    if "learning_rate" in saved and "learning_rate" in current:
        told = change_of_course(
            saved["learning_rate"],
            current["learning_rate"],
            checkpoint_step(checkpoint),
            current["global_batch_size"],
        )
        if told is not None:
            logger.warning("%s: %s", shown(checkpoint), told)


def rename_later_checkpoints(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step` to `….abandoned`: a run that goes back to `step` takes another course.

    Otherwise `latest` would later find them and mix two courses. Returns the new paths.

    Raises:
        UserError: they cannot be renamed.
    """
    later = [path for path in checkpoints_in(output_dir) if checkpoint_step(path) > step]
    renamed = []
    for path in later:
        target = path.with_name(path.name + ABANDONED)
        try:
            remove(target)
            renamed.append(path.rename(target))
        except OSError as error:
            raise UserError(
                f"{shown(path)} is of the course that this run leaves at step {step}, and cannot be renamed to "
                f"{shown(target.name)} ({error.strerror}). Move it elsewhere."
            ) from error
    return renamed


def remove(path: Path) -> None:
    """Delete a folder, or whatever else has its name; of a link the link alone.

    Raises:
        OSError: it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _has_name_and_content(path: Path) -> bool:
    # Of a Path, the same question raises on names that the system refuses.
    return _NAME.fullmatch(path.name) is not None and os.path.isdir(path)


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    moved = {"location"} if _may_have_moved(saved["data"], current["data"]) else set()
    differences = [
        f"{where}{shown(name)}: {shown(repr(before.get(name)))} in the checkpoint, {shown(repr(now.get(name)))} now"
        for where, before, now, ignored in (
            ("--", _DEFAULTS | saved["configuration"], current["configuration"], set()),
            ("data ", saved["data"], current["data"], moved),
        )
        for name in sorted({*before, *now} - ignored)
        if not _same(before.get(name), now.get(name))
    ]
    if saved["global_batch_size"] != current["global_batch_size"]:
        differences.append(
            f"global batch size (--train_batch_size x devices x --gradient_accumulation_steps): "
            f"{saved['global_batch_size']} in the checkpoint, {current['global_batch_size']} now"
        )
    return differences


def _same(before: Any, now: Any) -> bool:
    """1 and 1.0 may come of the same flag; 1 and true do not."""
    return before == now and isinstance(before, bool) == isinstance(now, bool)


def _may_have_moved(saved: dict[str, Any], current: dict[str, Any]) -> bool:
    fingerprint, locations = current.get("fingerprint"), current.get("location")
    if fingerprint is None or fingerprint != saved.get("fingerprint"):
        return False
    paths = locations if isinstance(locations, list) else [locations]
    return all(isinstance(path, str) and Path(path).exists() for path in paths)


@contextmanager
def last_save_may_fail(finished: bool) -> Iterator[None]:
    """Around saving a checkpoint: one that cannot be written is only a warning where the training is `finished`.

    What it trained is smaller and worth more, and is still to be saved.
    """
    try:
        yield
    except ValueError as error:
        if not finished:
            raise
        logger.warning("%s (The training is finished, and its result is saved now.)", error)
