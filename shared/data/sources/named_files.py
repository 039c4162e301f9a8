"""Which files the rows of a data set may name.

Whoever wrote the rows is not whoever trains on them. A row that could name any file would put the user's own pictures
and captions into what a run shows and uploads.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unicodedata import normalize

from shared.config import TrainConfig
from shared.data.addresses import check_address, described, local_path, scheme_of, zip_parts
from shared.data.sample import BadSampleError, NoText
from shared.untrusted import shown
from shared.user_errors import UserError

_FLAG = "--allowed_data_dirs"

_LONGEST_NAME = 4096  # bytes; Linux opens no longer path
_OF_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


class NamedFiles:
    """Turns the names in rows into files of the data's folder, files of the folders that the user allowed, addresses.

    Links are followed before a file counts as being in a folder.
    """

    def __init__(
        self, data: str, folder: Path | None, allowed: Iterable[str | Path], *, addresses: bool = False
    ) -> None:
        """
        Args:
            data: what a message calls the data set.
            folder: its own folder, to which names are relative; None for a data set of the Hub.
            allowed: further folders.
            addresses: whether rows may name remote files.
        """
        self._data, self._folder, self._addresses = data, folder, addresses
        own = () if folder is None else (folder,)
        folders = [Path(path).resolve() for path in (*own, *allowed)]
        roots = (*folders, *(blobs for one in folders for blobs in _blobs_of_snapshot(one)))
        self._roots = tuple(os.path.join(root, "") for root in roots)

    def find(self, name: Any, base: Path | None = None) -> Path | str | None:
        """The picture that a row's value names, None where it names none.

        Args:
            name: the value.
            base: the folder to which the name is relative, where it is not the data's.

        Raises:
            BadSampleError: it lies outside of the folders, or is an address that is not read, or no name at all.
        """
        if isinstance(name, NoText):
            raise BadSampleError(f"it names {name.words}; expected the name of a file")
        if not isinstance(name, str) or not name:
            return None
        if (parts := zip_parts(name)) is not None:
            archive = self.find(parts[1], base)
            return f"zip://{parts[0]}::{archive}"
        if scheme_of(name) is None:
            return self._file(name, base)
        if not self._addresses:
            raise BadSampleError(f"it names {described(name)}; expected a file of {shown(self._folder)}")
        check_address(name)
        return name

    def check_own(self, path: Path) -> None:
        """Raises UserError for a file of the data set itself, such as its list of rows, that leads out of it."""
        try:
            self._check_inside(path)
        except BadSampleError as error:
            raise UserError(f"{shown(path)} cannot be used: {error}") from None

    def _file(self, name: str, base: Path | None) -> Path:
        """The first reading of a name that is a file, else the name as it is. None of them leads out of the folders."""
        first, *others = _readings(local_path(name))
        path = self._inside(first, name, base)
        is_of_windows = _OF_WINDOWS.match(name)
        if not (others or is_of_windows) or os.path.lexists(path):
            return path
        for reading in others:
            if os.path.lexists(found := self._inside(reading, name, base)):
                return found
        if is_of_windows:
            raise BadSampleError(
                f"it names {shown(name)}, a file of another machine; expected a name relative to the data's folder"
            )
        return path

    def _inside(self, reading: str, name: str, base: Path | None) -> Path:
        base = base or self._folder
        path = Path(reading) if base is None else base / reading
        if not path.is_absolute() and base is None:
            raise BadSampleError(f"it names {shown(name)}, relative to a folder that {shown(self._data)} does not have")
        self._check_inside(path, name)
        return path

    def _check_inside(self, path: Path, name: str | None = None) -> None:
        try:
            os.fsencode(path)
            resolved = os.path.realpath(path)
        except (OSError, ValueError):  # a NUL, half a character, a name too long
            given = shown(path if name is None else name)
            raise BadSampleError(f"it names {given}, which is no file name that can be followed") from None
        if not f"{resolved}{os.sep}".startswith(self._roots):
            given = shown(path if name is None else name)
            where = "" if str(path) == resolved or given == shown(resolved) else f" (which leads to {shown(resolved)})"
            raise BadSampleError(
                f"it names {given}{where}, outside of {self._own()}. If you trust the data, add "
                f"{_FLAG} {shown(os.path.dirname(resolved))}"
            )

    def _own(self) -> str:
        if self._folder is None:
            return f"what was downloaded of {shown(self._data)}"
        return f"the data's folder {shown(self._folder)}"


def allowed_folders(config: TrainConfig) -> list[Path]:
    """The folders of --allowed_data_dirs. UserError for one that does not exist."""
    folders = [Path(name) for name in config.allowed_data_dirs or ()]
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"{_FLAG} has {shown(folder)!r}, which is no folder; give folders that exist")
    return folders


def _readings(name: str) -> list[str]:
    """What a name may mean, likeliest first: as it is; without blanks around it; with the backslashes of Windows for
    slashes; with accents composed, as most programs write them, or apart, as macOS does.

    On Linux all of these are names of different files.
    """
    if len(name) > _LONGEST_NAME or (name.isascii() and "\\" not in name and name == name.strip()):
        return [name]
    stripped = dict.fromkeys((name, name.strip()))
    slashed = dict.fromkeys(reading for one in stripped for reading in (one, one.replace("\\", "/")))
    forms = (form for one in slashed for form in (one, normalize("NFC", one), normalize("NFD", one)))
    return list(dict.fromkeys(forms))


def _blobs_of_snapshot(folder: Path) -> list[Path]:
    """The Hub's cache keeps a repository's files in `blobs`, and links to them in `snapshots/REVISION`."""
    repositories = [parent.parent for parent in (folder, *folder.parents) if parent.parent.name == "snapshots"]
    return [repository.parent / "blobs" for repository in repositories if os.path.isdir(repository.parent / "blobs")]
