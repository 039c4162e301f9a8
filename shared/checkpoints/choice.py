"""Which checkpoint a run resumes from: the one that is asked for, if it is still what was saved."""

import logging
from collections.abc import Sequence
from pathlib import Path

from shared.checkpoints.digests import Verdict, examine
from shared.checkpoints.policy import (
    CHECKPOINT_PREFIX,
    check_no_links_out,
    checkpoints_in,
    entries,
    is_checkpoint,
)
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_MOST_SHOWN = 20


def checkpoint_to_resume(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The folder that `--resume_from_checkpoint` means: `latest`, a name in `output_dir`, a path. None: start afresh.

    `latest` in a folder without checkpoints starts afresh, so that one command line can be repeated until it is done.
    It passes over those that are damaged. Whatever is resumed is read once to see that it is what was saved.

    Raises:
        UserError: the named checkpoint does not exist or is damaged, all are damaged, a fresh run would mix with the
            checkpoints of another, or the folder cannot be read.
    """
    existing = checkpoints_in(output_dir)
    names = shown(", ".join(path.name for path in existing)) or "none"
    if resume_from_checkpoint is None:
        if existing:
            raise UserError(
                f"--output_dir {shown(output_dir)} already holds checkpoints of a run ({names}). To continue it, add "
                "--resume_from_checkpoint latest; to start a new one, choose another --output_dir or delete them."
            )
        return None
    if resume_from_checkpoint == "latest":
        check_no_links_out(entries(output_dir))
        return _newest_whole(output_dir, existing)
    for path in (output_dir / resume_from_checkpoint, Path(resume_from_checkpoint)):
        check_no_links_out([path])
        if is_checkpoint(path):
            _check_whole(path)
            return path
    raise UserError(
        f"--resume_from_checkpoint {shown(resume_from_checkpoint)}: there is no such checkpoint. Expected 'latest', "
        f"the name of a checkpoint in {shown(output_dir)} (there: {names}), or the path of a {CHECKPOINT_PREFIX}N "
        "folder."
    )


def check_same_choice(steps: Sequence[int | None]) -> None:
    """Of the processes of a run, which have all looked for themselves: the steps that they would go on from.

    Raises:
        UserError: they differ.
    """
    if len(set(steps)) > 1:
        found = ", ".join(
            f"process {number} {'none' if step is None else f'{CHECKPOINT_PREFIX}{step}'}"
            for number, step in enumerate(steps)
        )
        raise UserError(
            f"The processes of this run would resume from different checkpoints: {found}. On every host, ask python3 "
            "-m shared.check_run about --output_dir; then name a checkpoint that is whole on all."
        )


def _newest_whole(output_dir: Path, existing: list[Path]) -> Path | None:
    """None where there are no checkpoints; where there are, a fresh start would be a loss that nobody asked for."""
    if not existing:
        logger.info("%s holds no checkpoint to resume from yet: the run starts afresh", shown(output_dir))
        return None
    damaged: list[str] = []
    for checkpoint in reversed(existing):
        verdict = _examined(checkpoint)
        if not verdict.damage:
            if damaged:
                logger.warning("The run goes on from %s instead", shown(checkpoint))
            return checkpoint
        logger.warning("%s is passed over. It is %s", shown(checkpoint), verdict)
        damaged.append(f"{shown(checkpoint.name)} is {verdict}")
    raise UserError(
        f"--resume_from_checkpoint latest: no checkpoint in {shown(output_dir)} is what was saved there:\n  "
        + "\n  ".join(damaged[:_MOST_SHOWN])
        + "\nCopy one there that is whole, from a backup, or start a new run in another --output_dir."
    )


def _check_whole(checkpoint: Path) -> None:
    verdict = _examined(checkpoint)
    if verdict.damage:
        raise UserError(
            f"{shown(checkpoint)} is {verdict}. Resume from another checkpoint: --resume_from_checkpoint latest takes "
            "the newest one that is whole."
        )


def _examined(checkpoint: Path) -> Verdict:
    verdict = examine(checkpoint)
    if not verdict.has_digests:
        logger.info("%s %s. Versions before this one wrote none", shown(checkpoint), verdict)
    return verdict
