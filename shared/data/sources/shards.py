"""WebDataset tars on a local disk: headers are read once, then every sample is within reach."""

import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from shared.config import TrainConfig
from shared.data.sample import RawSample
from shared.data.sources.base import Manifest, RandomAccessSource, StreamSource
from shared.data.sources.shard_keys import MOST_MEMBERS, ShardKeys, raw_sample, shard_keys, split_member, twice
from shared.data.sources.shard_stream import ShardStream, is_local
from shared.data.sources.tar_reading import DamagedTarError, FileContent, read_at, regular_files
from shared.outgoing.redaction import is_shell_command, redacted
from shared.untrusted import open_file, shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_MOST_COMBINATIONS = 10_000_000  # the largest public collection has half a million shards
_MOST_BRACES = 100  # nobody nests or repeats them so; the time to expand them grows with their square
_LONGEST_NUMBER = 18  # digits
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_ALTERNATIVES = re.compile(r"\{([^{}]*,[^{}]*)\}")

_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz")
_SHELL_SCHEMES = ("pipe",)
_REMOTE_SCHEMES = ("http", "https", "gs", "hf", "ais", "sftp", "ftps", "scp")  # what webdataset's gopen reads


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member's content lies in its shard."""

    extension: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class IndexedSample:
    """Where the parts of a sample lie."""

    shard: Path
    key: str
    image: Member | None
    conditioning_image: Member | None
    caption: Member | None


def open_shards(config: TrainConfig) -> RandomAccessSource | StreamSource:
    """The samples of --train_shards: random access when all are uncompressed local tars, a stream otherwise.

    Raises:
        UserError: for shards that do not exist, URLs that run shell commands without --allow_shell_urls, files that
            are not tars, or keys that cannot be told.
    """
    locations = list(expand(config.train_shards or []))
    if not locations:
        raise UserError("--train_shards names no shards; give paths or URLs, e.g. data/train-{000000..000099}.tar")
    _check_shell(locations, config.allow_shell_urls)
    _check_schemes(locations)
    keys = shard_keys(config.shards_image_key, config.shards_conditioning_key, config.shards_caption_key)
    if all(is_local(location) and not location.endswith(_COMPRESSED) for location in locations):
        return ShardSource([Path(location) for location in locations], keys)
    return ShardStream(locations, keys, config)


class ShardSource:
    """Random access to the samples of local tars, through positioned reads."""

    def __init__(self, shards: list[Path], keys: ShardKeys) -> None:
        self._keys = keys
        self._samples = [sample for shard in shards for sample in index_shard(shard, keys)]
        if not self._samples:
            raise UserError(
                f"{shown(shards[0])} and its like hold no samples; expected WebDataset members such as 0001.image.png"
            )
        self.manifest: Manifest = {
            "kind": "shards",
            "location": [str(shard) for shard in shards],
            "samples": len(self._samples),
            "fingerprint": _fingerprint(self._samples),
            "columns": [list(keys.image), list(keys.conditioning_image), list(keys.caption)],
        }

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> RawSample:
        return self._read(self._samples[index])

    def captions(self, index: int) -> tuple[str, ...]:
        """Without reading the images."""
        return self._read(replace(self._samples[index], image=None, conditioning_image=None)).captions

    def _read(self, sample: IndexedSample) -> RawSample:
        name = f"{sample.shard}:{sample.key}"
        parts = (sample.image, sample.conditioning_image, sample.caption)
        defect = next(filter(None, (self._keys.too_large(part.extension, part.size) for part in parts if part)), "")
        if defect:
            return RawSample(None, None, (), name, defect)
        # Opened per sample: thousands of shards would not fit a process's open files, and threads share nothing here.
        with open_file(sample.shard) as file:
            image, conditioning_image, caption = (_read(sample.shard, file.fileno(), part) for part in parts)
        named_caption = (sample.caption.extension, caption) if sample.caption and caption is not None else None
        return raw_sample(name, image, conditioning_image, named_caption)


def expand(patterns: Iterable[str]) -> Iterator[str]:
    """Shard paths and URLs from patterns with braces (`{000..099}`, `{a,b}`) and, for local paths, globs.

    `pipe:` commands are left as they are. UserError for a local pattern that matches nothing, and for open braces.
    """
    for pattern in patterns:
        for location in [pattern] if pattern.startswith("pipe:") else _expand_braces(pattern):
            if not is_local(location):
                yield location
                continue
            path = location.removeprefix("file://").removeprefix("file:")
            matches = [path] if os.path.isfile(path) else _glob(path)
            if not matches:
                raise UserError(
                    f"--train_shards: no file {shown(path)!r} (from {shown(redacted(pattern))!r}); give existing .tar "
                    "files"
                )
            yield from matches


def _expand_braces(pattern: str) -> list[str]:
    import braceexpand

    if _combinations(pattern) > _MOST_COMBINATIONS:
        raise UserError(
            f"--train_shards: the braces of {shown(redacted(pattern))!r} name more than {_MOST_COMBINATIONS:,} shards; "
            "check their ranges"
        )
    try:
        return list(braceexpand.braceexpand(pattern))
    except (ValueError, RecursionError):  # unbalanced or thousands of braces; the message quotes the pattern
        raise UserError(
            f"--train_shards: the braces of {shown(redacted(pattern))!r} do not match; close each"
        ) from None


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
    return [] if "\0" in path else sorted(glob.glob(path, recursive=True))


def index_shard(shard: Path, keys: ShardKeys) -> Iterator[IndexedSample]:
    """The samples of one tar, grouped as webdataset groups them: consecutive members of one key.

    UserError for a file that is no uncompressed tar, and for a first sample in which the keys cannot be told.
    """
    for number, (key, members) in enumerate(_groups(shard)):
        if number == 0:
            keys.check(members, shown(shard))
        parts = (members[extension] if extension else None for extension in keys.find(members))
        yield IndexedSample(shard, key, *parts)
    logger.debug("indexed %s", shard)


def _groups(shard: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    current, members = None, dict[str, Member]()
    for name, offset, size in _headers(shard):
        split = split_member(name)
        if split is None:
            continue
        key, extension = split
        if key != current:
            if current is not None:
                yield current, members
            current, members = key, {}
        if extension in members:
            raise twice(shard, name)
        if len(members) >= MOST_MEMBERS:
            raise UserError(f"{shown(shard)} holds a sample of more than {MOST_MEMBERS:,} members; leave it out")
        members[extension] = Member(extension, offset, size)
    if current is not None:
        yield current, members


def _headers(shard: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the content, size) of every regular file in a tar."""
    with open_file(shard) as file:
        content = FileContent(file.fileno())
        try:
            for name, size in regular_files(content):
                yield name, content.position, size
        except DamagedTarError as error:
            raise UserError(
                f"{shown(shard)} cannot be read as an uncompressed tar: {error}; write it again or leave it out"
            ) from error


def _read(shard: Path, descriptor: int, member: Member | None) -> bytes | None:
    if member is None:
        return None
    try:
        content = read_at(descriptor, member.offset, member.size)
    except OSError as error:
        raise UserError(f"{shown(shard)} cannot be read: {error.strerror}.") from error
    if len(content) < member.size:
        raise UserError(f"{shown(shard)} has become shorter since it was opened. Leave it as it is while training.")
    return content


def _fingerprint(samples: list[IndexedSample]) -> str:
    """A hash of every sample's shard name, key and layout, and not of where the shards lie."""
    digest = hashlib.sha256()
    for sample in samples:
        parts = (sample.image, sample.conditioning_image, sample.caption)
        digest.update(
            repr((sample.shard.name, sample.key, [part and (part.offset, part.size) for part in parts])).encode()
        )
    return digest.hexdigest()


def _check_shell(locations: list[str], allowed: bool) -> None:
    commands = [location for location in locations if is_shell_command(location)]
    if commands and not allowed:
        raise UserError(
            f"--train_shards has {shown(redacted(commands[0]))!r}, which runs a shell command; add "
            "--allow_shell_urls if you trust it, or name the files or URLs themselves"
        )


def _check_schemes(locations: list[str]) -> None:
    known = (*_SHELL_SCHEMES, *_REMOTE_SCHEMES)
    for location in locations:
        scheme = location.partition(":")[0]
        if not is_local(location) and scheme not in known:
            raise UserError(
                f"--train_shards has {shown(redacted(location))!r}, and {shown(scheme)}: cannot be read; expected "
                f"paths or one of {', '.join(known)}: (a command such as 'pipe:aws s3 cp ADDRESS -' reads "
                "anything else)"
            )
