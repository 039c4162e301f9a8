"""Images and captions that were encoded before: the shards of a cache, read as any others."""

from dataclasses import replace
from pathlib import Path

from shared.config import TrainConfig
from shared.data.cache_record import RECORD_FILE, CacheRecord, record_for
from shared.data.cached_latents import CachedImage, LatentsLayout
from shared.data.sample import RawSample
from shared.data.sources.base import Manifest
from shared.data.sources.shard_keys import ShardKeys, condition_members
from shared.data.sources.shards import ShardSource
from shared.untrusted import shown
from shared.user_errors import UserError

LATENTS, CAPTIONS = "latents.safetensors", "json"
"""The extensions of a sample's members, beside those of its conditions."""

_FIX = "run the command that made it once more, which makes what is missing."


class CachedSource:
    """Random access to a cache's samples. Their images are `CachedImage`s."""

    def __init__(self, folder: Path, record: CacheRecord) -> None:
        """Raises UserError where shards are missing or damaged."""
        paths = shards_in(folder)
        if not paths:
            raise UserError(f"--cached_data {shown(folder)} has no shards any more: {_FIX}")
        self._shards = ShardSource(paths, keys_of(record))
        if len(self._shards) != record.samples:
            raise UserError(
                f"--cached_data {shown(folder)} has {len(self._shards):,} samples and its {RECORD_FILE} tells of "
                f"{record.samples:,}: {_FIX}"
            )
        self._layout = record.layout
        self.manifest: Manifest = self._shards.manifest | {"kind": "cached_data"}

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def latents(self) -> LatentsLayout:
        """See `latents_of`."""
        return self._layout

    def __getitem__(self, index: int) -> RawSample:
        sample = self._shards[index]
        assert sample.image is None or isinstance(sample.image, bytes)
        return replace(sample, image=None if sample.image is None else CachedImage(sample.image, self._layout))

    def captions(self, index: int) -> tuple[str, ...]:
        """See `captions_at`."""
        return self._shards.captions(index)


def open_cached(config: TrainConfig, folder: Path) -> CachedSource:
    """The samples of `folder`, a run's --cached_data.

    Raises:
        UserError: it is no finished cache, or none for this run.
    """
    return CachedSource(folder, record_for(config, folder))


def keys_of(record: CacheRecord) -> ShardKeys:
    """Those of a cache's samples."""
    conditions = condition_members(len(record.channels_of_conditions))
    return ShardKeys((LATENTS,), tuple((member,) for member in conditions), (CAPTIONS,))


def shards_in(folder: Path) -> list[Path]:
    """In the order of their samples."""
    return sorted(path for path in folder.glob("cache-*.tar") if not path.name.startswith("."))
