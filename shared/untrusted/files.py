"""Opening files that others wrote: regular files only, and no more of them than is honest.

A pipe or a device in a file's place would wait for ever or never end.
"""

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from shared.untrusted.text import shown
from shared.user_errors import UserError

MIB = 2**20
_BLOCK = 4 * MIB

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered where the caller reads it whole.

    Raises:
        UserError: it is missing, may not be read, or is no regular file; the message names it.
    """
    try:
        # Opening a pipe would wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{shown(path)} cannot be read: {_reason(error)}.") from error
    try:
        _check_regular(path, os.fstat(descriptor))
    except ValueError:
        os.close(descriptor)
        raise
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


def read_file(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        UserError: as `open_file`, or it is larger.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        _check_size(path, size, limit)
        try:
            content = os.read(file.fileno(), size + 1)
            if len(content) != size:  # it has changed, was interrupted, or is of a kind that does not tell its size
                content += file.read(limit + 1 - len(content))
        except OSError as error:
            raise UserError(f"{shown(path)} cannot be read: {_reason(error)}.") from error
    _check_size(path, len(content), limit)
    return content


def sha256_from(descriptor: int, place: int = 0) -> str:
    """SHA-256 of an open file's content from there on, in hexadecimal.

    In blocks: while one is read or hashed other threads go on, and after it Ctrl-C is heard.

    Raises:
        OSError: the disk fails.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    while size := os.preadv(descriptor, [block], place):
        digest.update(block[:size])
        place += size
    return digest.hexdigest()


def check_plain_files(paths: Iterable[Path], limit: int | None = None) -> None:
    """Whether a library may open these files; those that are missing are left to it.

    Raises:
        UserError: one is no regular file, or has more than `limit` bytes.
    """
    for path in paths:
        try:
            status = path.stat()
        except (OSError, ValueError):
            continue
        _check_regular(path, status)
        if limit is not None:
            _check_size(path, status.st_size, limit)


def check_plain_tree(folder: Path, most: int) -> None:
    """Whether a library may open everything below a folder.

    Raises:
        UserError: something there is no regular file, or a link that leads out of the folder; or there are more than
            `most` entries.
    """
    entries = 0
    for parent, folders, files in os.walk(folder):
        entries += len(folders) + len(files)
        if entries > most:
            raise UserError(f"{shown(folder)} has more than {most:,} files, which no honest folder of its kind has.")
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not is_inside(path, [folder]):
                raise UserError(f"{shown(path)} is a link that leads out of its folder: expected a file.")
        check_plain_files(Path(parent, name) for name in files)


def is_inside(path: str | Path, folders: Iterable[str | Path]) -> bool:
    """Whether a path, with all links followed, lies in one of the folders."""
    try:
        resolved = Path(path).resolve()
    except (OSError, ValueError, RuntimeError):  # a circle of links, a NUL, a name too long
        return False
    return any(resolved.is_relative_to(Path(folder).resolve()) for folder in folders)


def _check_regular(path: str | Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise UserError(f"{shown(path)} is {kind}: expected a file.")


def _check_size(path: str | Path, size: int, limit: int) -> None:
    if size > limit:
        raise UserError(f"{shown(path)} has more than {limit / MIB:,.0f} MiB, which no honest file of its kind has.")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or shown(error)
