"""One run at a time in a folder.

The operating system holds the lock as long as the process lives, however that ends. (A child that a library has forked
holds it too.) The file stays where a process was killed, and says so itself; the next run takes it over.
"""

import errno
import fcntl
import logging
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

_HELD_BY_ANOTHER = (errno.EWOULDBLOCK, errno.EACCES)
_ATTEMPTS = 100  # each but the last met a run that was just ending
_LONGEST_NOTE = 1000  # bytes: the longest of ours has some 400
_HOLDER = re.compile(r"process \d+ on [^\s,]+, since [^.\n]+")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this run, until the end of it or of the process.

    On file systems without locks it only warns.

    Raises:
        UserError: another run holds it, or its file cannot be made.
    """
    path = folder / LOCK_FILE
    descriptor = _taken(path)
    try:
        _leave_note(path, descriptor)
        yield
    finally:
        _release(path, descriptor)


def _taken(path: Path) -> int:
    """A descriptor of the file, locked."""
    for _ in range(_ATTEMPTS):
        descriptor = _opened(path)
        try:
            _check_regular(path, descriptor)
            _lock(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # its run has ended and removed it since it was opened
    raise UserError(
        f"{shown(path)} is removed again and again while it is locked. Start the run when no other starts there."
    )


def _opened(path: Path) -> int:
    try:
        # No link of that name is followed, and no pipe waited for.
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"{shown(path)}, which marks a folder as used by a run, cannot be opened ({error.strerror}). If no run "
            "uses that folder, delete it and start again; or choose another --output_dir."
        ) from error


def _check_regular(path: Path, descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UserError(f"{shown(path)} is to be the file of a lock, but it is something else. Delete it.")


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_BY_ANOTHER:
            raise UserError(
                f"--output_dir {shown(path.parent)} is in use by another run ({_holder(descriptor)}), and two would "
                "mix their figures and checkpoints. Wait until that one has ended or stop it, or choose another "
                "--output_dir."
            ) from error
        logger.warning(
            "The file system of %s has no locks (%s): make sure that no other run uses this folder",
            *(path.parent, error.strerror),
        )


def _holder(descriptor: int) -> str:
    note = os.pread(descriptor, _LONGEST_NOTE, 0).decode("utf-8", "replace")
    found = _HOLDER.search(note)
    return shown(found[0]) if found else "it does not say which"


def _leave_note(path: Path, descriptor: int) -> None:
    """For whoever finds the file."""
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    note = (
        f"A training run uses this folder: process {os.getpid()} on {socket.gethostname()}, since {now}.\n"
        "Only as long as that process lives: the next run takes this file over by itself, and without such a process "
        "it may be deleted.\n"
    )
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, note.encode(), 0)
    except OSError as error:
        logger.warning("%s cannot say which run uses the folder (%s); it is locked all the same", path, error.strerror)


def _release(path: Path, descriptor: int) -> None:
    try:
        # While it is held: a run that has opened it meanwhile then finds that another file, or none, has the name.
        if _is_at(path, descriptor):
            path.unlink()
    except OSError as error:
        logger.warning("%s could not be deleted (%s); it is in nobody's way", path, error.strerror)
    finally:
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        there = path.lstat()
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
