"""WebDataset tars on a local disk: headers are read once, then every sample is within reach."""

import glob
import hashlib
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.config import TrainConfig
from shared.data.sample import RawSample
from shared.data.sources.base import Manifest, RandomAccessSource, StreamSource
from shared.data.sources.shard_keys import ShardKeys, raw_sample, shard_keys, split_member
from shared.data.sources.shard_stream import ShardStream
from shared.redaction import is_shell_command, redacted

logger = logging.getLogger(__name__)

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
        ValueError: for shards that do not exist, URLs that run shell commands without --allow_shell_urls, files that
            are not tars, or keys that cannot be told.
    """
    locations = list(expand(config.train_shards or []))
    if not locations:
        raise ValueError("--train_shards names no shards; give paths or URLs, e.g. data/train-{000000..000099}.tar")
    _check_shell(locations, config.allow_shell_urls)
    _check_schemes(locations)
    keys = shard_keys(config.shards_image_key, config.shards_conditioning_key, config.shards_caption_key)
    if all(_is_local(location) and not location.endswith(_COMPRESSED) for location in locations):
        return ShardSource([Path(location) for location in locations], keys)
    return ShardStream(locations, keys, config)


class ShardSource:
    """Random access to the samples of local tars, through positioned reads."""

    def __init__(self, shards: list[Path], keys: ShardKeys) -> None:
        self._samples = [sample for shard in shards for sample in index_shard(shard, keys)]
        if not self._samples:
            raise ValueError(
                f"{shards[0]} and its like hold no samples; expected WebDataset members such as 0001.image.png"
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
        sample = self._samples[index]
        # Opened per sample: thousands of shards would not fit a process's open files, and threads share nothing here.
        with sample.shard.open("rb", buffering=0) as file:
            image = _read(file.fileno(), sample.image)
            conditioning_image = _read(file.fileno(), sample.conditioning_image)
            caption = _read(file.fileno(), sample.caption)
        named_caption = (sample.caption.extension, caption) if sample.caption and caption is not None else None
        return raw_sample(f"{sample.shard}:{sample.key}", image, conditioning_image, named_caption)


def expand(patterns: Iterable[str]) -> Iterator[str]:
    """Shard paths and URLs from patterns with braces (`{000..099}`, `{a,b}`) and, for local paths, globs.

    `pipe:` commands are left as they are. ValueError for a local pattern that matches nothing, and for open braces.
    """
    import braceexpand

    for pattern in patterns:
        try:
            locations = [pattern] if pattern.startswith("pipe:") else list(braceexpand.braceexpand(pattern))
        except ValueError:  # unbalanced braces; the message quotes the pattern
            raise ValueError(f"--train_shards: the braces of {redacted(pattern)!r} do not match; close each") from None
        for location in locations:
            if not _is_local(location):
                yield location
                continue
            path = location.removeprefix("file://").removeprefix("file:")
            matches = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
            if not matches:
                raise ValueError(
                    f"--train_shards: no file {path!r} (from {redacted(pattern)!r}); give existing .tar files"
                )
            yield from matches


def index_shard(shard: Path, keys: ShardKeys) -> Iterator[IndexedSample]:
    """The samples of one tar, grouped as webdataset groups them: consecutive members of one key.

    ValueError for a file that is no uncompressed tar, and for a first sample in which the keys cannot be told.
    """
    for number, (key, members) in enumerate(_groups(shard)):
        if number == 0:
            keys.check(members, str(shard))
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
            raise ValueError(f"{shard} holds {name!r} twice; write each member of a sample once")
        members[extension] = Member(extension, offset, size)
    if current is not None:
        yield current, members


def _headers(shard: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the content, size) of every regular file in a tar."""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg():
                    yield member.name, member.offset_data, member.size
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header of a shard
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{shard} cannot be read as an uncompressed tar: {error}; write it again or leave it out"
        ) from error


def _read(descriptor: int, member: Member | None) -> bytes | None:
    return os.pread(descriptor, member.size, member.offset) if member else None


def _fingerprint(samples: list[IndexedSample]) -> str:
    """A hash of every sample's shard name, key and layout, and not of where the shards lie."""
    digest = hashlib.sha256()
    for sample in samples:
        parts = (sample.image, sample.conditioning_image, sample.caption)
        digest.update(
            repr((sample.shard.name, sample.key, [part and (part.offset, part.size) for part in parts])).encode()
        )
    return digest.hexdigest()


def _is_local(location: str) -> bool:
    scheme, colon, _ = location.partition(":")
    return scheme == "file" or not colon or "/" in scheme


def _check_shell(locations: list[str], allowed: bool) -> None:
    commands = [location for location in locations if is_shell_command(location)]
    if commands and not allowed:
        raise ValueError(
            f"--train_shards has {redacted(commands[0])!r}, which runs a shell command; add --allow_shell_urls if you "
            "trust it, or name the files or URLs themselves"
        )


def _check_schemes(locations: list[str]) -> None:
    known = (*_SHELL_SCHEMES, *_REMOTE_SCHEMES)
    for location in locations:
        scheme = location.partition(":")[0]
        if not _is_local(location) and scheme not in known:
            raise ValueError(
                f"--train_shards has {redacted(location)!r}, and {scheme}: cannot be read; expected paths or one of "
                f"{', '.join(known)}: (a command such as 'pipe:aws s3 cp ADDRESS -' reads anything else)"
            )
