"""Images and captions that were encoded before: the shards of a cache, read as any others."""

from dataclasses import replace
from pathlib import Path

from shared.config import TrainConfig
from shared.data.cache_record import CacheRecord, record_for
from shared.data.cached_latents import CachedImage, LatentsLayout
from shared.data.sample import RawSample
from shared.data.sources.base import Manifest
from shared.data.sources.shard_keys import ShardKeys
from shared.data.sources.shards import ShardSource
from shared.untrusted import shown
from shared.user_errors import UserError

LATENTS, CONDITION, CAPTIONS = "latents.safetensors", "conditioning_image.png", "json"
"""The extensions of a sample's members."""

KEYS = ShardKeys((LATENTS,), (CONDITION,), (CAPTIONS,))


class CachedSource:
    """Random access to a cache's samples. Their images are `CachedImage`s."""

    latents: LatentsLayout | None

    def __init__(self, folder: Path, record: CacheRecord) -> None:
        """Raises UserError where shards are missing or damaged."""
        paths = shards_in(folder)
        if not paths:
            raise UserError(f"--cached_data {shown(folder)} has no shards any more. Make the cache anew.")
        self._shards = ShardSource(paths, KEYS)
        if len(self._shards) != record.samples:
            raise UserError(
                f"--cached_data {shown(folder)} has {len(self._shards):,} samples and its cache.json tells of "
                f"{record.samples:,}. Delete cache.json and run the command that made it once more."
            )
        self.latents = record.layout
        self.manifest: Manifest = self._shards.manifest | {"kind": "cached_data"}

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> RawSample:
        sample = self._shards[index]
        assert sample.image is None or isinstance(sample.image, bytes)
        assert self.latents is not None
        return replace(sample, image=None if sample.image is None else CachedImage(sample.image, self.latents))

    def captions(self, index: int) -> tuple[str, ...]:
        """See `captions_at`."""
        return self._shards.captions(index)


def open_cached(config: TrainConfig) -> CachedSource:
    """The samples of --cached_data.

    Raises:
        UserError: it is no finished cache, or none for this run.
    """
    record = record_for(config)
    assert record is not None
    return CachedSource(Path(str(config.cached_data)), record)


def shards_in(folder: Path) -> list[Path]:
    """In the order of their samples."""
    return sorted(path for path in folder.glob("cache-*.tar") if not path.name.startswith("."))
