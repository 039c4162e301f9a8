"""The samples of a source with their numbers, from any of them on: by number, or by reading a stream up to there."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

from shared.data.sample import RawSample
from shared.data.sources import RandomAccessSource, Source

NumberedSample = tuple[int, Callable[[], RawSample]]
"""A sample's number and what reads it, which for a stream has happened already."""


def numbered(source: Source) -> Iterator[NumberedSample]:
    """All samples of a source, or of a stream's first epoch."""
    if isinstance(source, RandomAccessSource):
        return ((number, partial(source.__getitem__, number)) for number in range(len(source)))
    return ((number, partial(_itself, sample)) for number, sample in enumerate(source.iterate(0)))


def in_groups(samples: Iterator[NumberedSample], size: int) -> Iterator[Iterator[NumberedSample]]:
    """Groups of `size`, the last of what is left. Nothing is held; what a group was not asked for is passed over."""
    while (first := next(samples, None)) is not None:
        group = itertools.islice(samples, size - 1)
        yield itertools.chain([first], group)
        deque(group, maxlen=0)


def _itself(sample: RawSample) -> RawSample:
    return sample
