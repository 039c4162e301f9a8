"""What every file of a checkpoint was when it was complete, so that one that has changed since is found and named.

checkpoint-N/digests.json  {"files": {NAME: {"bytes": N, "sha256": HEX}, …}, "sha256": HEX of `files` themselves}
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple, TypedDict

from msgspec import Meta

from shared.outgoing.atomic_files import write_text_atomically
from shared.untrusted import check_plain_tree, open_file, read_json, sha256_from, shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

DIGESTS_FILE = "digests.json"
# SHA-256, for which processors have instructions: 1 GB takes 0.7 s of one core of an EPYC, with BLAKE2b 1.2 s.

_MOST_FILES = 100_000
_MOST_BYTES = 2**38  # a quarter of a TiB: ten times the state of the largest model
_SAID_IN_THE_LOG = 10**9  # bytes: half a second, or ten on a slow disk
_SHOWN = 3


class _Digest(TypedDict):
    bytes: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class _Digests(TypedDict):
    files: dict[str, _Digest]
    sha256: str


class Verdict(NamedTuple):
    """On a checkpoint. Without digests nothing is known of it, and `damage` is empty as for one that is whole."""

    has_digests: bool
    damage: tuple[str, ...]

    def __str__(self) -> str:
        if not self.has_digests:
            return f"cannot be checked: it has no {DIGESTS_FILE}"
        if not self.damage:
            return "whole"
        more = len(self.damage) - _SHOWN
        return "damaged: " + "; ".join(self.damage[:_SHOWN]) + (f"; and {more} files more" if more > 0 else "")


def write_digests(folder: Path) -> None:
    """Of all files that are below a folder now.

    Raises:
        OSError: one cannot be read, or there is no room.
        UserError: something there is no file.
    """
    files: dict[str, _Digest] = {
        name: {"bytes": size, "sha256": _sha256(folder / name)}
        for name, size in sorted(_sizes(folder).items())
        if name != DIGESTS_FILE
    }
    written: _Digests = {"files": files, "sha256": _sha256_of(files)}
    write_text_atomically(folder / DIGESTS_FILE, json.dumps(written, indent=2) + "\n")


def examine(checkpoint: Path) -> Verdict:
    """Read a whole checkpoint and compare it with its digests. What is wrong with it is in the verdict, none raised."""
    if not os.path.lexists(checkpoint / DIGESTS_FILE):
        return Verdict(False, ())
    try:
        return Verdict(True, tuple(_damage(checkpoint, _read_digests(checkpoint))))
    except UserError as error:
        return Verdict(True, (str(error).rstrip(". "),))
    except OSError as error:  # a disk that fails, or a run that is just deleting it
        return Verdict(True, (f"{shown(error.filename)} cannot be read ({error.strerror})",))


def digest_of_checkpoint(checkpoint: Path) -> str | None:
    """One for all of its files, as they were when it was complete; None where it has no digests.

    Raises:
        UserError: its digests are damaged.
    """
    if not os.path.lexists(checkpoint / DIGESTS_FILE):
        return None
    return _sha256_of(_read_digests(checkpoint))


def _read_digests(checkpoint: Path) -> Mapping[str, _Digest]:
    path = checkpoint / DIGESTS_FILE
    if path.is_symlink():
        raise UserError(f"{shown(path)} is a link: expected a file")
    digests: _Digests = read_json(path, _Digests, fix="")
    if digests["sha256"] != _sha256_of(digests["files"]):
        raise UserError(f"{DIGESTS_FILE} is not what was written")
    return digests["files"]


def _damage(checkpoint: Path, expected: Mapping[str, _Digest]) -> list[str]:
    """No name of `expected` is ever opened that is not that of a file which was found in the folder."""
    sizes = _sizes(checkpoint)
    del sizes[DIGESTS_FILE]
    missing = [f"{shown(name)} is missing" for name in sorted(expected.keys() - sizes.keys())]
    foreign = [f"{shown(name)} was not there when it was saved" for name in sorted(sizes.keys() - expected.keys())]
    other_sizes = [
        f"{shown(name)} has {size:,} bytes, of {expected[name]['bytes']:,} that were written"
        for name, size in sorted(sizes.items())
        if name in expected and size != expected[name]["bytes"]
    ]
    if missing or foreign or other_sizes:  # known without reading the rest
        return missing + other_sizes + foreign
    return _changed(checkpoint, expected, sum(sizes.values()))


def _changed(checkpoint: Path, expected: Mapping[str, _Digest], total: int) -> list[str]:
    if total > _MOST_BYTES:
        return [f"it has {total / 2**30:,.0f} GiB, which no honest checkpoint has"]
    if total > _SAID_IN_THE_LOG:
        logger.info("Checking the %.1f GB of %s", total / 1e9, shown(checkpoint))
    changed = []
    for name, digest in sorted(expected.items()):
        try:
            found = _sha256(checkpoint / name)
        except OSError as error:  # a disk that fails
            changed.append(f"{shown(name)} cannot be read ({error.strerror})")
            continue
        if found != digest["sha256"]:
            changed.append(
                f"{shown(name)} is not what was written (its SHA-256 is {found[:12]}…, not {digest['sha256'][:12]}…)"
            )
    return changed


def _sizes(folder: Path) -> dict[str, int]:
    """Of all files below a folder, by their names from there on. Raises UserError where something is no file."""
    check_plain_tree(folder, _MOST_FILES)
    paths = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _sha256(path: Path) -> str:
    with open_file(path) as file:
        return sha256_from(file.fileno())


def _sha256_of(files: Mapping[str, _Digest]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
