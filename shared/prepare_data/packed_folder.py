"""The folder of a packing: shards, `packed.json`, and until the end, in `.packing`, what is done.

A shard counts as finished when it has its name; what was left out of it stands in `.packing` by then.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.outgoing.atomic_files import write_atomically, write_text_atomically
from shared.run.lock import LOCK_FILE
from shared.untrusted import MIB, read_json, shown
from shared.user_errors import UserError

CARD = "packed.json"

_WORK = ".packing"
_SHARD = re.compile(r"\d{6,}\.tar")
_UNFINISHED = re.compile(r"\.(?:\d{6,}\.tar|packed\.json)\S*\.[0-9a-f]{8}\.tmp")  # of a killed program
_NAMED = 5  # of the files that are in the way
_LARGEST_CARD = 256 * MIB
_FIX = "Choose another --output_dir, or delete this one's files."


@dataclass(frozen=True)
class LeftOut:
    """A sample that cannot be used, and why."""

    sample: str
    reason: str


@dataclass(frozen=True)
class Done:
    """What is known of a finished shard."""

    samples: int
    left_out: list[LeftOut]


@dataclass(frozen=True)
class _Card:
    """What is read of a `packed.json`."""

    packed_by: str
    finished: bool
    settings: dict[str, Any]
    shards: int


class PackedFolder:
    """Where shards of one packing are written, each whole or not at all."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Begins in an empty folder, or goes on in it.

        Args:
            path: of the folder, which nobody else writes to.
            settings: all that decides what the shards hold, as it reads back from JSON.

        Raises:
            UserError: it cannot be written to, holds other files, or another packing.
        """
        self._path, self._settings = path, dict(settings)
        self._work = path / _WORK
        try:
            self.is_finished = self._goes_on()
            if not self.is_finished:
                self._clear_unfinished()
                self._work.mkdir(exist_ok=True)
                self._write_card(False, [])
        except OSError as error:
            raise self._not_written(error) from error

    def shard(self, number: int) -> Path:
        """Where the shard of a number belongs."""
        return self._path / f"{number:06d}.tar"

    def done(self, number: int) -> Done | None:
        """What is known of a shard that is finished, None of one that is not.

        Raises:
            UserError: what is known of it cannot be read.
        """
        if not self.shard(number).is_file() or not self._record(number).is_file():
            return None
        return read_json(self._record(number), Done, fix=f"Delete {shown(self.shard(number))}, which is made again.")

    def write_shard(self, number: int, write: Callable[[Path], Done]) -> Done:
        """Let `write` make a shard.

        Raises:
            UserError: it cannot be written.
        """
        made: list[Done] = []

        def write_and_record(temporary: Path) -> None:
            made.append(write(temporary))
            write_text_atomically(self._record(number), json.dumps(asdict(made[0])))

        try:
            write_atomically(self.shard(number), write_and_record)
        except OSError as error:
            raise self._not_written(error) from error
        return made[0]

    def finish(self, shards: list[Done]) -> None:
        """Say that all is there.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self._write_card(True, shards)
            shutil.rmtree(self._work)
        except OSError as error:
            raise self._not_written(error) from error

    def _goes_on(self) -> bool:
        """Whether all is there already. UserError for a folder of anything but this packing."""
        found = sorted(entry.name for entry in self._path.iterdir())
        if CARD not in found:
            others = [name for name in found if name != LOCK_FILE and not _UNFINISHED.fullmatch(name)]
            if others:
                raise UserError(
                    f"--output_dir {shown(self._path)} is not empty, and holds no {CARD} (but "
                    f"{shown(', '.join(others[:_NAMED]))}): expected a new folder, or that of this packing."
                )
            return False
        card: _Card = read_json(self._path / CARD, _Card, fix=_FIX, limit=_LARGEST_CARD)
        for name in sorted({*card.settings, *self._settings}):
            before, now = card.settings.get(name), self._settings.get(name)
            if before != now:
                raise UserError(
                    f"--output_dir {shown(self._path)} holds another packing: its {shown(name)} was "
                    f"{shown(json.dumps(before))}, and is {shown(json.dumps(now))} now. {_FIX}"
                )
        # Where somebody has deleted some, all are made again: what was left out of which is no longer known.
        return card.finished and all(self.shard(number).is_file() for number in range(card.shards))

    def _clear_unfinished(self) -> None:
        for folder in (self._path, self._work):
            for entry in folder.iterdir() if folder.is_dir() else ():
                if _UNFINISHED.fullmatch(entry.name) or (folder is self._work and entry.name.endswith(".tmp")):
                    entry.unlink()

    def _record(self, number: int) -> Path:
        return self._work / f"{number:06d}.json"

    def _write_card(self, finished: bool, shards: list[Done]) -> None:
        content = {
            "packed_by": "controlnet-trainer",
            "finished": finished,
            "settings": self._settings,
            "shards": len(shards),
            "samples": sum(done.samples for done in shards),
            "left_out": [asdict(sample) for done in shards for sample in done.left_out],
        }
        write_text_atomically(self._path / CARD, json.dumps(content, indent=2) + "\n")

    def _not_written(self, error: OSError) -> UserError:
        return UserError(
            f"--output_dir {shown(self._path)} cannot be written to ({error.strerror or shown(error)}). If the disk is "
            "full, free some space; the same command goes on from here. Or choose another folder."
        )
