"""Files appear whole or not at all, and take the place of whatever had their name, a planted link included."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

_PRIVATE = 0o600
_USUAL = 0o666  # less what the process's umask takes away


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
