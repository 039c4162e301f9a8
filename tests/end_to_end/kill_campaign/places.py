"""Folders that fill up, and folders that nobody may change any more: what of it this system lets us do."""

import ctypes
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.end_to_end.kill_campaign.kinds import KEEP

_CLONE_NEWNS = 0x00020000
_MS_REMOUNT, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20, 0x4000, 0x40000, 2
_GET_FLAGS, _SET_FLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10  # linux/fs.h: FS_IOC_GETFLAGS, …, FS_IMMUTABLE_FL
_ROOM = 2**28  # bytes of memory: a tiny run has 30 MB
_libc = ctypes.CDLL(None, use_errno=True)


def make_mounts_private() -> None:
    """From here on, what this process mounts is seen by itself and by what it starts, and is gone with them.

    To be called while there is one thread. Raises OSError where the system does not allow it.
    """
    _check(_libc.unshare(_CLONE_NEWNS))
    _mount(None, "/", _MS_REC | _MS_PRIVATE, None)


class SmallDisk:
    """A file system in memory, as large as we say."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self.folder = folder
        _mount("tmpfs", str(folder), 0, f"size={_ROOM}")

    def leave_room(self, share: float, checkpoint: int) -> None:
        """A share of what the run needs for its next checkpoints, of so many bytes each, before it deletes one."""
        have = len([path for path in self.folder.glob("*/checkpoint-*") if path.name.count(".") == 0])
        needed = max(1, KEEP + 1 - have) * checkpoint
        status = os.statvfs(self.folder)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        self._resize(used + int(0.9 * share * needed))

    def make_room(self) -> None:
        self._resize(_ROOM)

    def remove(self) -> None:
        _check(_libc.umount2(os.fsencode(self.folder), _MNT_DETACH))

    def _resize(self, size: int) -> None:
        _mount("tmpfs", str(self.folder), _MS_REMOUNT, f"size={size}")


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be made, renamed or deleted in the folder; files that are open can be written.

    By its permissions, or for root, who ignores those, by the attribute that makes files immutable. Raises OSError
    where the file system has none.
    """
    if os.geteuid() == 0:
        _set_immutable(folder, True)
    else:
        folder.chmod(0o555)
    try:
        yield
    finally:
        if os.geteuid() == 0:
            _set_immutable(folder, False)
        else:
            folder.chmod(stat.S_IRWXU)


def try_read_only() -> None:
    """Raises OSError where the file system of temporary files has no such thing."""
    with TemporaryDirectory() as folder, read_only(Path(folder)):
        pass


def _set_immutable(folder: Path, value: bool) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        (flags,) = struct.unpack("l", fcntl.ioctl(descriptor, _GET_FLAGS, struct.pack("l", 0)))
        flags = flags | _IMMUTABLE if value else flags & ~_IMMUTABLE
        fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("l", flags))
    finally:
        os.close(descriptor)


def _mount(source: str | None, target: str, flags: int, options: str | None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, "tmpfs", options)]
    source_, target_, kind, options_ = texts
    _check(_libc.mount(source_, target_, kind, ctypes.c_ulong(flags), options_))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
