"""What a source is: random access where the data allows it, a stream where it does not."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from shared.data.sample import RawSample
from shared.randomness import Purpose, generator

Manifest = dict[str, Any]
"""JSON-able identity of a source: kind, location, samples (None if unknown), fingerprint (None if unknown), columns."""


@runtime_checkable
class RandomAccessSource(Protocol):
    """Samples that can be read in any order, from several threads."""

    manifest: Manifest

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawSample: ...


@runtime_checkable
class StreamSource(Protocol):
    """Samples that come one after the other. The order of an epoch is a function of the seed and the epoch alone."""

    manifest: Manifest

    def iterate(self, epoch: int) -> Iterator[RawSample]: ...


Source = RandomAccessSource | StreamSource


class SubsetSource:
    """A seeded random choice of `count` samples, the same in every epoch (diffusers: `shuffle(seed).select`)."""

    def __init__(self, source: RandomAccessSource, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"--max_train_samples is {count}; expected at least 1, or leave it out to use everything")
        self._source = source
        self._indices = generator(seed, Purpose.SUBSET, 0).permutation(len(source))[:count]
        self.manifest = source.manifest | {"max_train_samples": count, "subset_seed": seed}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> RawSample:
        return self._source[int(self._indices[index])]
