"""What a source is: random access where the data allows it, a stream where it does not."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from shared.data.cached_latents import LatentsLayout
from shared.data.sample import BadSampleError, EncodedImage, RawSample
from shared.data.sources.order import AllBut, Indices, beginning, is_computed, random_order
from shared.randomness import Purpose
from shared.user_errors import UserError

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


@runtime_checkable
class StreamsInLanes(Protocol):
    """A `StreamSource` that can be read as several beside each other, each of which reads a part of the data alone."""

    manifest: Manifest

    @property
    def most_lanes(self) -> int:
        """Into which it can be divided."""
        ...

    def iterate(self, epoch: int) -> Iterator[RawSample]: ...

    def lanes(self, count: int, wanted: Sequence[int]) -> dict[int, StreamSource]:
        """Those with these numbers among `count`, to be read together. Their order depends on `count`, too."""
        ...


@runtime_checkable
class TellsCaptions(Protocol):
    """A `RandomAccessSource` that reads a sample's captions without its images."""

    def captions(self, index: int) -> tuple[str, ...]:
        """Raises BadSampleError for what is no caption."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A `RandomAccessSource` whose samples take time on their way."""

    def read_ahead(self, index: int) -> None:
        """Begin to read a sample that will be asked for."""
        ...


@runtime_checkable
class TellsHeaders(Protocol):
    """A `RandomAccessSource` that reads the beginning of a sample's image without the rest of the sample."""

    def header(self, index: int) -> EncodedImage | None:
        """The image, or its first bytes; None for what is none."""
        ...


@runtime_checkable
class BringsLatents(Protocol):
    """A source whose images may be encoded already. They are not where `latents` is None."""

    @property
    def latents(self) -> LatentsLayout | None: ...


def latents_of(source: Source) -> LatentsLayout | None:
    """How a source's images are encoded; None where they are pictures."""
    return source.latents if isinstance(source, BringsLatents) else None


def captions_at(source: RandomAccessSource, index: int) -> tuple[str, ...]:
    """All captions of a sample; those of a bad one are anything."""
    if not isinstance(source, TellsCaptions):
        return source[index].captions
    try:
        return source.captions(index)
    except BadSampleError:
        return ()


def header_at(source: RandomAccessSource, index: int) -> EncodedImage | None:
    """A sample's image, of which no more need be there than its header mostly takes."""
    if isinstance(source, TellsHeaders):
        return source.header(index)
    return image_at(source, index)


def image_at(source: RandomAccessSource, index: int) -> EncodedImage | None:
    """A sample's image; None where it has none."""
    sample = source[index]
    return None if sample.defect or sample.image is None else sample.picture


class SubsetSource:
    """Some samples of another source, in an order of their own. `indices` are theirs in that source."""

    def __init__(self, source: RandomAccessSource, indices: Indices, manifest: Manifest) -> None:
        self._source = source
        self.indices = indices
        self.manifest = source.manifest | manifest

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> RawSample:
        return self._source[int(self.indices[index])]

    @property
    def latents(self) -> LatentsLayout | None:
        """See `latents_of`."""
        return latents_of(self._source)

    def read_ahead(self, index: int) -> None:
        """See `ReadsAhead`."""
        if isinstance(self._source, ReadsAhead):
            self._source.read_ahead(int(self.indices[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        """See `captions_at`."""
        return captions_at(self._source, int(self.indices[index]))

    def header(self, index: int) -> EncodedImage | None:
        """See `header_at`."""
        return header_at(self._source, int(self.indices[index]))


def train_subset(source: RandomAccessSource, count: int, seed: int) -> SubsetSource:
    """A seeded random choice of `count` samples, the same in every epoch (diffusers: `shuffle(seed).select`)."""
    if count < 1:
        raise UserError(f"--max_train_samples is {count}; expected at least 1, or leave it out to use everything")
    indices = beginning(random_order(len(source), seed, Purpose.SUBSET, 0), count)
    manifest = {"max_train_samples": count, "subset_seed": seed, "samples": len(indices)}
    return SubsetSource(source, indices, manifest)


def hold_out(source: RandomAccessSource, count: int, seed: int) -> tuple[SubsetSource, SubsetSource]:
    """A source without `count` randomly chosen samples, and those samples.

    Raises:
        UserError: nothing would be left to train on.
    """
    if count >= len(source):
        raise UserError(
            f"--num_evaluation_samples is {count}, but there are {len(source)} samples in all; hold out fewer"
        )
    order = beginning(random_order(len(source), seed, Purpose.HELD_OUT, 0), count)
    held_out = np.fromiter(order, np.int64, count)
    manifest = {"held_out": count, "held_out_seed": seed, "samples": len(source) - count}
    return SubsetSource(source, AllBut(len(source), held_out), manifest), SubsetSource(source, held_out, manifest)


def with_order_named(source: RandomAccessSource) -> RandomAccessSource:
    """The source, whose manifest says where orders are computed: a run that was begun when they were held is refused
    by name then, and does not go on in another order."""
    if is_computed(len(source)):
        source.manifest = source.manifest | {"order": "computed"}
    return source
