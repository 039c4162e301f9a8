"""From the patterns of --train_shards to paths and addresses."""

import glob
import os
import re
from collections.abc import Iterable, Iterator

from shared.data.addresses import PACKAGES
from shared.data.sources.shard_index import SUFFIX
from shared.data.sources.shard_stream import is_local, is_remote
from shared.outgoing.redaction import is_shell_command, redacted
from shared.untrusted import shown
from shared.user_errors import UserError

_MOST_COMBINATIONS = 10_000_000  # the largest public collection has half a million shards
_MOST_BRACES = 100  # nobody nests or repeats them so; the time to expand them grows with their square
_LONGEST_NUMBER = 18  # digits
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_ALTERNATIVES = re.compile(r"\{([^{}]*,[^{}]*)\}")

_SHELL_SCHEMES = ("pipe",)
_GOPEN_SCHEMES = ("ais", "sftp", "ftps", "scp")  # which webdataset reads, through programs


def check_shell(locations: list[str], allowed: bool) -> None:
    """UserError for a shell command that is not allowed."""
    commands = [location for location in locations if is_shell_command(location)]
    if commands and not allowed:
        raise UserError(
            f"--train_shards has {shown(redacted(commands[0]))!r}, which runs a shell command; add "
            "--allow_shell_urls if you trust it, or name the files or URLs themselves"
        )


def check_schemes(locations: list[str]) -> None:
    """UserError for an address that is not read."""
    by_programs = (*_SHELL_SCHEMES, *_GOPEN_SCHEMES)
    for location in locations:
        scheme = location.partition(":")[0]
        chained = is_remote(location) and "::" in location  # fsspec's way of one file system on another
        if chained or not (is_local(location) or is_remote(location) or scheme in by_programs):
            raise UserError(
                f"--train_shards has {shown(redacted(location))!r}, and {shown(scheme)}: cannot be read; expected "
                f"paths or one of {', '.join((*PACKAGES, *by_programs))}: (a command such as "
                "'pipe:rclone cat ADDRESS' reads anything else)"
            )


def expand(patterns: Iterable[str], named: str = "--train_shards") -> Iterator[str]:
    """Shard paths and URLs from patterns with braces (`{000..099}`, `{a,b}`) and, for local paths, globs.

    `pipe:` commands are left as they are. UserError for a local pattern that matches nothing, and for open braces,
    which says that `named` has them.
    """
    for pattern in patterns:
        for location in [pattern] if pattern.startswith("pipe:") else _expand_braces(pattern, named):
            if not is_local(location):
                yield location
                continue
            path = location.removeprefix("file://").removeprefix("file:")
            matches = [path] if os.path.isfile(path) else _glob(path)
            if not matches:
                raise UserError(
                    f"{named}: no file {shown(path)!r} (from {shown(redacted(pattern))!r}); give existing .tar files"
                )
            yield from matches


def _expand_braces(pattern: str, named: str) -> list[str]:
    import braceexpand

    if _combinations(pattern) > _MOST_COMBINATIONS:
        raise UserError(
            f"{named}: the braces of {shown(redacted(pattern))!r} name more than {_MOST_COMBINATIONS:,} shards; "
            "check their ranges"
        )
    try:
        return list(braceexpand.braceexpand(pattern))
    except (ValueError, RecursionError):  # unbalanced or thousands of braces; the message quotes the pattern
        raise UserError(f"{named}: the braces of {shown(redacted(pattern))!r} do not match; close each") from None


def _combinations(pattern: str) -> int:
    """At least as many as the braces make; once beyond the limit, it is not counted on."""
    if pattern.count("{") > _MOST_BRACES:
        return _MOST_COMBINATIONS + 1
    count = 1
    for first, last, step in _RANGE.findall(pattern):
        if max(len(first), len(last), len(step)) > _LONGEST_NUMBER:
            return _MOST_COMBINATIONS + 1
        count *= abs(int(last) - int(first)) // (int(step or 1) or 1) + 1
        if count > _MOST_COMBINATIONS:
            return count
    for alternatives in _ALTERNATIVES.findall(pattern):
        count *= alternatives.count(",") + 1
        if count > _MOST_COMBINATIONS:
            return count
    return count


def _glob(path: str) -> list[str]:
    found = [] if "\0" in path else glob.glob(path, recursive=True)
    return sorted(name for name in found if not name.endswith(SUFFIX))
