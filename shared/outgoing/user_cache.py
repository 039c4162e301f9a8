"""What the project keeps for later runs where a user's programs keep such things."""

import os
from pathlib import Path

PROJECT = "controlnet-trainer"


def in_user_cache(part: str) -> Path:
    """A folder of the project's part of the user's cache folder (XDG Base Directory Specification)."""
    # The specification tells to ignore relative paths.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / PROJECT / part
