"""Encoded texts in the files of a folder, found by their tokens.

A text is known by its token ids, which are all that the encoders see of it: captions that differ in what the tokenizer
passes over share a row, and another tokenizer needs no other folder.

Axes: B texts asked for, L tokens.
"""

import hashlib
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.data.tokenization import TokenIds
from shared.precomputed_text.layout import Layout
from shared.precomputed_text.parts import TextPart
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_ENDING = ".safetensors"
_SAID_IN_THE_LOG = 10**9  # bytes: half a second, or ten on a slow disk


class StoredText:
    """token ids → arrays of a `Layout`, [B, …] each. Safe to use from several threads."""

    def __init__(self, folder: Path, layout: Layout, wanted: Collection[bytes]) -> None:
        """Opens the files that hold any of the wanted keys; one that cannot be opened counts as missing."""
        self._layout = layout
        self._rows: dict[bytes, tuple[TextPart, int]] = {}
        wanted = frozenset(wanted)
        for path in _files_in(folder):
            try:
                part = TextPart(path, layout)
            except UserError as error:  # which another process may just be making anew
                logger.debug("%s", error)
                continue
            own = {key: (part, row) for row, key in enumerate(part.keys) if key in wanted and key not in self._rows}
            self._rows |= own
            if not own:
                part.close()

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def __call__(self, token_ids: TokenIds) -> dict[str, npt.NDArray[Any]]:
        """Raises UserError for a text that was not wanted, and where a file was cut or the disk fails."""
        keys = keys_of(token_ids)
        arrays = {
            name: np.empty((len(keys), *shape), self._layout.dtype) for name, shape in self._layout.shapes.items()
        }
        for index, key in enumerate(keys):
            if key not in self._rows:
                raise UserError(
                    "A caption is not among those that were encoded at the start: the data have changed since. Start "
                    "the run again."
                )
            part, row = self._rows[key]
            for name, array in arrays.items():
                part.read(name, row, array[index])
        return arrays


def keys_of(token_ids: TokenIds) -> list[bytes]:
    """What each text is found by: SHA-256 of all its token ids."""
    rows = [np.ascontiguousarray(token_ids[name], "<i4") for name in sorted(token_ids)]
    return [hashlib.sha256(b"".join(ids[index].tobytes() for ids in rows)).digest() for index in range(len(rows[0]))]


def part_path(folder: Path, keys: Sequence[bytes]) -> Path:
    """The file of just these texts: whoever else encodes them writes the same one."""
    return folder / (hashlib.sha256(b"".join(keys)).hexdigest() + _ENDING)


def remove_damaged(folder: Path, layout: Layout, wanted: Collection[bytes]) -> None:
    """Delete, and name in the log, the files that are not what was written, so that they are made anew.

    Those that hold nothing wanted are not read to their end.

    Raises:
        UserError: one cannot be deleted, or the disk fails.
    """
    wanted, paths = frozenset(wanted), _files_in(folder)
    size = sum(map(_size, paths))
    if size > _SAID_IN_THE_LOG:
        logger.info("Checking the captions encoded before, of at most %.1f GB", size / 1e9)
    for path in paths:
        damage = _damage(path, layout, wanted)
        if not damage:
            continue
        logger.warning("What %s held is encoded anew: %s", shown(path.name), damage)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{shown(path)} is damaged and cannot be deleted ({error.strerror}). Delete it.") from error


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == _ENDING and not path.name.startswith("."))


def _size(path: Path) -> int:
    """0 where another process has just deleted it."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _damage(path: Path, layout: Layout, wanted: frozenset[bytes]) -> str:
    """What is wrong with a file, in words; nothing where it is whole."""
    try:
        part = TextPart(path, layout)
    except UserError as error:
        return str(error)
    try:
        is_whole = wanted.isdisjoint(part.keys) or part.is_whole()
    finally:
        part.close()
    return "" if is_whole else f"{shown(path)} is not what was written."
