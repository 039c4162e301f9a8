"""WebDataset tars that can only be read from front to back: URLs, commands, compressed files."""

import itertools
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from shared.config import TrainConfig
from shared.data.sample import RawSample
from shared.data.sources.base import Manifest
from shared.data.sources.shard_keys import ShardKeys, raw_sample
from shared.data.sources.shuffling import buffered_shuffle
from shared.randomness import Purpose, generator
from shared.redaction import redacted

_DRAIN_BYTES = 2**20


class ShardStream:
    """Plain webdataset streaming of undecoded samples, shards in a seeded order, through a shuffle buffer.

    Every host reads everything, so that what is at a position does not depend on the number of hosts.
    """

    def __init__(self, locations: list[str], keys: ShardKeys, config: TrainConfig) -> None:
        """Reads the first sample. ValueError when there is none, or its keys cannot be told."""
        self._locations, self._keys = locations, keys
        self._seed, self._buffer_size = config.seed, config.shuffle_buffer_size
        self._max_samples = config.max_train_samples
        first = next(self._read(locations), None)
        if first is None:
            shown = redacted(locations[0])
            raise ValueError(f"{shown} and its like hold no samples; expected members such as 0001.image.png")
        keys.check(_extensions(first), redacted(locations[0]))
        self.manifest: Manifest = {
            "kind": "shard_stream",
            "location": [redacted(location) for location in locations],
            "samples": None,
            "fingerprint": None,
            "columns": [list(keys.image), list(keys.conditioning_image), list(keys.caption)],
            "shuffle_buffer_size": config.shuffle_buffer_size,
            "max_train_samples": config.max_train_samples,
        }

    def iterate(self, epoch: int) -> Iterator[RawSample]:
        """The samples of one epoch. --max_train_samples takes the same first ones in every epoch."""
        if self._max_samples is not None:
            members: Iterator[dict[str, Any]] = itertools.islice(self._read(self._locations), self._max_samples)
        else:
            order = generator(self._seed, Purpose.SHARD_ORDER, epoch).permutation(len(self._locations))
            members = self._read([self._locations[index] for index in order])
        return buffered_shuffle(map(self._raw_sample, members), self._buffer_size, self._seed, epoch)

    def _read(self, locations: list[str]) -> Iterator[dict[str, Any]]:
        for location in locations:
            try:
                yield from _read_shard(location)
            except (OSError, tarfile.TarError) as error:
                # The message and the cause may quote the whole command, with a token in it.
                raise ValueError(
                    f"--train_shards: reading {redacted(location)} failed ({type(error).__name__}). Check that it "
                    "exists, is a tar, and may be read from here."
                ) from None

    def _raw_sample(self, members: dict[str, Any]) -> RawSample:
        image, conditioning_image, caption = self._keys.find(_extensions(members))
        return raw_sample(
            f"{redacted(members['__url__'])}:{members['__key__']}",
            members[image] if image else None,
            members[conditioning_image] if conditioning_image else None,
            (caption, members[caption]) if caption else None,
        )


def _read_shard(location: str) -> Iterator[dict[str, Any]]:
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys, tar_file_expander

    stream = gopen(location)
    try:
        yield from group_by_keys(tar_file_expander([{"url": location, "stream": stream}]))
        while stream.read(_DRAIN_BYTES):
            pass
    except BaseException:  # the reader stopped early, or failed; either way the stream is to be closed
        with suppress(OSError):  # a command cut off in mid-output says so, which is no news here
            stream.close()
        raise
    stream.close()  # raises where the command failed, which may have shortened the tar without a trace


def _extensions(members: dict[str, Any]) -> list[str]:
    return [name for name in members if not name.startswith("__")]
