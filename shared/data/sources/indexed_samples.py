"""The samples of shards that are in indexes: found beside the shards, and each read when it is asked for."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np

from shared.data.sample import RawSample
from shared.data.sources.shard_index import SUFFIX, Columns, ShardIndex
from shared.data.sources.shard_keys import ShardKeys, raw_sample
from shared.data.sources.shard_layout import IndexedSample, Member, Shard
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_HEADER_BYTES = 128 * 1024  # a JPEG file with a thumbnail and a colour profile has its size within them
_MOST_IN_FOLDER = 100  # indexes; people keep a handful of collections in a folder


class IndexedSamples(Sequence[IndexedSample]):
    """The samples of shards that are all in indexes, in the order of the shards, each read when it is asked for."""

    def __init__(self, shards: Sequence[Shard], places: list[tuple[ShardIndex, int]]) -> None:
        """`places`: of each shard its index, and its number there."""
        self._shards, self._places = shards, places
        counts = [index.description.shards[number].samples for index, number in places]
        self._ends = np.cumsum(counts, dtype=np.int64)

    @property
    def fingerprint(self) -> str | None:
        """As an index has stored it, None where these are other shards than those of one index, or in another order."""
        index = self._places[0][0]
        in_order = [(index, number) for number in range(len(index.description.shards))]
        return index.description.fingerprint if self._places == in_order else None

    def shards_that_begin_with_less(self) -> Iterator[Shard]:
        """Those whose first sample lacks an image, a condition or a caption."""
        for shard, (index, number) in zip(self._shards, self._places, strict=True):
            if index.description.shards[number].samples:
                first = index.sample(number, 0, shard)
                if None in first.parts:
                    yield shard

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, place: int) -> IndexedSample: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[IndexedSample]: ...

    def __getitem__(self, place: int | slice) -> IndexedSample | Sequence[IndexedSample]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        shard = int(np.searchsorted(self._ends, place, side="right"))
        index, number = self._places[shard]
        before = int(self._ends[shard - 1]) if shard else 0
        return index.sample(number, place - before, self._shards[shard])

    def __iter__(self) -> Iterator[IndexedSample]:
        for shard, (index, number) in zip(self._shards, self._places, strict=True):
            yield from index.samples(number, shard)


def read_sample(
    sample: IndexedSample, keys: ShardKeys, contents_of: Callable[[list[Member | None]], list[bytes | None]]
) -> RawSample:
    """The sample whose parts `contents_of` reads, unless one is larger than any honest one; that is then its defect."""
    name = f"{sample.shard}:{sample.key}"
    parts = list(sample.parts)
    defect = next(filter(None, (keys.too_large(part.extension, part.size) for part in parts if part)), "")
    if defect:
        return RawSample(None, (), (), name, defect)
    image, *conditions, caption = contents_of(parts)
    named_caption = (sample.caption.extension, caption) if sample.caption and caption is not None else None
    return raw_sample(name, image, conditions, named_caption)


def beginning_of_image(sample: IndexedSample) -> IndexedSample | None:
    """The sample without all but the first bytes of its image, which mostly hold its header; None where it has none."""
    if sample.image is None:
        return None
    beginning = replace(sample.image, size=min(sample.image.size, _HEADER_BYTES))
    return replace(sample, image=beginning, conditioning_images=(), caption=None)


def find_index(shards: list[Path], keys: ShardKeys) -> IndexedSamples | None:
    """The samples as the indexes in the shards' folders know them; None where those do not cover all of the shards.

    Raises:
        UserError: an index is damaged, or a shard is not the one that was indexed.
    """
    known: dict[tuple[Path, str], tuple[ShardIndex, int]] = {}
    for folder in dict.fromkeys(shard.parent for shard in shards):
        wanted = {shard.name for shard in shards if shard.parent == folder}
        for index in _usable(folder, wanted, keys.columns):
            for number, indexed in enumerate(index.description.shards):
                known.setdefault((folder, indexed.name), (index, number))
    if not known:
        return None
    missing = [shard for shard in shards if (shard.parent, shard.name) not in known]
    if missing:
        logger.warning(
            "No index is used, and all headers are read: %d of %d shards are in none, such as %s. python3 -m "
            "shared.prepare_data index makes one",
            len(missing),
            len(shards),
            shown(missing[0]),
        )
        return None
    places = [known[shard.parent, shard.name] for shard in shards]
    for shard, (index, number) in zip(shards, places, strict=True):
        _check_size(shard, index, number)
    for index in {id(index): index for index, _ in places}.values():
        index.check_contents()
    return IndexedSamples(shards, places)


def fingerprint_of(samples: Iterable[IndexedSample]) -> str:
    """A hash of every sample's shard name, key and layout, and not of where the shards lie."""
    digest = hashlib.sha256()
    for sample in samples:
        places = [part and (part.offset, part.size) for part in sample.parts]
        digest.update(repr((sample.shard.name, sample.key, places)).encode())
    return digest.hexdigest()


def indexes_in(folder: Path) -> list[Path]:
    """Every index of a folder, in the order of their names.

    Raises:
        UserError: there are more than anybody has.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(SUFFIX))
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be read: {error.strerror}.") from error
    if len(names) > _MOST_IN_FOLDER:
        raise UserError(f"{shown(folder)} holds {len(names)} files *{SUFFIX}; expected a few. Delete those not needed.")
    return [folder / name for name in names]


def _usable(folder: Path, wanted: set[str], columns: Columns) -> list[ShardIndex]:
    """Those of a folder that know these columns, the one of most of the wanted shards first."""
    usable = []
    for index in map(ShardIndex, indexes_in(folder)):
        if index.description.columns == columns:
            usable.append(index)
        else:
            logger.warning("%s is not used: it was made with other --shards_…_key", shown(index.name))
    return sorted(usable, key=lambda index: -len(wanted & {shard.name for shard in index.description.shards}))


def _check_size(shard: Path, index: ShardIndex, number: int) -> None:
    try:
        size = os.stat(shard).st_size
    except OSError as error:
        raise UserError(f"{shown(shard)} cannot be read: {error.strerror}.") from error
    expected = index.description.shards[number].size
    if size != expected:
        raise UserError(
            f"{shown(shard)} has {size:,} bytes, and had {expected:,} when it was indexed. Index it again (python3 -m "
            f"shared.prepare_data index), or delete {shown(index.name)}."
        )
