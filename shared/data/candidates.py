"""Which samples a global position may take: its own first, then those that stand in when it is bad.

What is at a position depends on the data, the seed and the position alone, so hosts agree without talking: a bad sample
is replaced by the ones that follow it in the same order, and those keep their own positions too.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shared.data.buckets.schedule import BucketSchedule
from shared.data.buckets.source import BucketedSource
from shared.data.sample import RawSample
from shared.data.sources.base import RandomAccessSource, ReadsAhead, StreamSource, SubsetSource
from shared.data.sources.order import KeyedOrder, random_order
from shared.data.views import Size
from shared.randomness import Purpose
from shared.user_errors import UserError


class Candidates(Protocol):
    """The samples for a position, best first. The iterator ends when a whole epoch was on offer."""

    def at(self, position: int) -> Iterator[RawSample]: ...

    def expect(self, positions: Iterable[int]) -> None: ...

    def forget_before(self, position: int) -> None: ...


class ShuffledCandidates:
    """Exact global shuffle of a random-access source: a permutation of its own for each epoch.

    Of several sources that are shuffled by one seed, each has a `part` of its own.
    """

    def __init__(self, source: RandomAccessSource, seed: int, part: int = 0, parts: int = 1) -> None:
        if not len(source):
            raise UserError(f"{source.manifest.get('location')} holds no samples; expected at least one")
        self._source, self._seed, self._part, self._parts = source, seed, part, parts
        # A batch touches two epochs at a boundary; those of buckets, which come in any order, three.
        self._order = lru_cache(maxsize=3)(self._order_of)

    def at(self, position: int) -> Iterator[RawSample]:
        count = len(self._source)
        epoch, offset = divmod(position, count)
        order = self._order(epoch)
        for attempt in range(count):
            yield self._source[int(order[(offset + attempt) % count])]

    def expect(self, positions: Iterable[int]) -> None:
        """These will be asked for: begin to read their samples, where those take time on their way."""
        if isinstance(self._source, ReadsAhead):
            for position in positions:
                epoch, offset = divmod(position, len(self._source))
                self._source.read_ahead(int(self._order(epoch)[offset]))

    def forget_before(self, position: int) -> None:
        """Nothing is kept."""

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64] | KeyedOrder:
        return random_order(len(self._source), self._seed, Purpose.ORDER, epoch * self._parts + self._part)


class BucketedCandidates:
    """A batch of one bucket for every optimizer step. A bad sample is replaced by one of its bucket."""

    def __init__(self, source: BucketedSource, seed: int, batch_size: int) -> None:
        """`batch_size`: the samples of an optimizer step."""
        self._buckets, self._batch_size = source.buckets, batch_size
        counts = [len(bucket.members_K) for bucket in self._buckets]
        self._schedule = BucketSchedule(counts, batch_size, seed)
        self._samples = [
            ShuffledCandidates(SubsetSource(source, bucket.members_K, {}), seed, index, len(self._buckets))
            for index, bucket in enumerate(self._buckets)
        ]

    def size_of(self, step: int) -> Size:
        """(width, height) of the pictures of a step, counted from 0."""
        return self._buckets[self._schedule.at(step).bucket].size

    def at(self, position: int) -> Iterator[RawSample]:
        step, row = divmod(position, self._batch_size)
        bucket, number = self._schedule.at(step)
        return self._samples[bucket].at(number * self._batch_size + row)

    def expect(self, positions: Iterable[int]) -> None:
        """See `ShuffledCandidates.expect`."""
        for position in positions:
            step, row = divmod(position, self._batch_size)
            bucket, number = self._schedule.at(step)
            self._samples[bucket].expect([number * self._batch_size + row])

    def forget_before(self, position: int) -> None:
        """Nothing is kept."""


class StreamCandidates:
    """A window, undecoded, on a stream's epochs one after another. Safe to use from several threads."""

    def __init__(self, source: StreamSource, max_skipped_samples: int) -> None:
        self._source = source
        # With at least one good sample per epoch, a run of bad ones spans two epochs at most.
        self._attempts = 2 * max_skipped_samples + 2
        self._lock = threading.Lock()
        self._keep_from = 0
        self._failure: BaseException | None = None
        self._restart()

    def at(self, position: int) -> Iterator[RawSample]:
        first: int | None = None
        for attempt in range(self._attempts):
            epoch, sample = self._get(position + attempt)
            first = epoch if first is None else first
            if epoch > first + 1:  # a whole epoch was on offer
                return
            yield sample

    def expect(self, positions: Iterable[int]) -> None:
        """A stream reads ahead by itself."""

    def begin_at(self, position: int) -> None:
        """Read up to there. Of what goes wrong, whoever asks for it will hear."""
        self.forget_before(position)
        with suppress(Exception):
            self._get(position)

    def forget_before(self, position: int) -> None:
        """Positions before this one will not be asked for. Going back is possible, by reading from the start."""
        with self._lock:
            self._keep_from = position
            while self._window and self._first < position:
                self._window.popleft()
                self._first += 1

    def _get(self, index: int) -> tuple[int, RawSample]:
        """(epoch, sample) at a position."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if index < self._first:
                self._restart()
            while index >= self._first + len(self._window):
                self._read_one()
            return self._window[index - self._first]

    def _read_one(self) -> None:
        try:
            sample = next(self._reader)
        except BaseException as error:  # a generator that raised is over: every thread must see why, not just this one
            self._failure = error
            raise
        if self._first + len(self._window) < self._keep_from:
            self._first += 1
        else:
            self._window.append(sample)

    def _restart(self) -> None:
        self._first = 0  # the position of the window's first sample
        self._window: deque[tuple[int, RawSample]] = deque()
        self._reader = self._read_epochs()

    def _read_epochs(self) -> Iterator[tuple[int, RawSample]]:
        epoch = 0
        while True:
            empty = True
            for sample in self._source.iterate(epoch):
                empty = False
                yield epoch, sample
            if empty:
                raise UserError(f"{self._source.manifest.get('location')} holds no samples; expected at least one")
            epoch += 1
