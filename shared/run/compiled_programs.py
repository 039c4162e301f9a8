"""Where compiled programs are kept for the next run (`--ccache`)."""

import logging
import os
from pathlib import Path

from shared.outgoing.user_cache import in_user_cache

logger = logging.getLogger(__name__)

OFF = "none"


def default_folder() -> Path:
    """In the user's cache folder."""
    return in_user_cache("compiled")


def usable(folder: Path) -> Path | None:
    """The folder, which is made for the user alone: a program runs with the rights of whoever loads it.

    None, after a warning, where it cannot be written to: it saves time, so its lack must not cost a run.
    """
    problem = _problem(folder)
    if problem is None:
        return folder
    logger.warning(
        "Compiled programs are not kept for the next run: %s cannot be %s. Name another folder with --ccache, or do "
        "without one by --ccache none.",
        *(folder, problem),
    )
    return None


def _problem(folder: Path) -> str | None:
    """What prevents keeping files there, in words."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"made ({error.strerror})"
    return None if os.access(folder, os.W_OK | os.X_OK) else "written to"
