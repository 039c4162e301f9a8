"""Files appear whole or not at all, and take the place of whatever had their name, a planted link included."""

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

_PRIVATE = 0o600
_USUAL = 0o666  # less what the process's umask takes away
# Ours, and what safetensors (since 0.8) writes before it gives that the name that it was told.
_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.tmp|\.tmp[0-9A-Za-z]{6}", re.DOTALL)


def write_atomically(path: Path, write: Callable[[Path], object], *, private: bool = False) -> None:
    """Let `write` make a file beside `path`, then move it there.

    `private`: for the user's eyes only, as for a file with credentials in it.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Made here, and never through a link that somebody else has put there.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE if private else _USUAL))
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that nobody but their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str, *, private: bool = False) -> None:
    """`write_atomically` for UTF-8 text."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), private=private)


def remove_unfinished_files(folder: Path) -> None:
    """Delete what was left in a folder, in which nobody writes now, by whoever was killed in `write_atomically`.

    Raises:
        OSError: it cannot be deleted.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY_NAME.fullmatch(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()


def append_whole(descriptor: int, content: bytes, end: int) -> int:
    """Write all of it at `end`, where the open file ends, or nothing: what a full disk took of it is given back.

    Returns where the file ends then. Raises OSError where it could not be written.
    """
    remaining, position = memoryview(content), end
    try:
        while remaining:
            written = os.pwrite(descriptor, remaining, position)
            remaining, position = remaining[written:], position + written
    except OSError:
        os.ftruncate(descriptor, end)
        raise
    return position
