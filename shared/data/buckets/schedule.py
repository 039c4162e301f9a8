"""Which bucket's batch each optimizer step takes: computed for any step, with nothing to go through before it."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.data.sources.order import KeyedOrder, random_order
from shared.randomness import Purpose

_STEPS_KEPT = 64  # those on their way, and some more


class BucketBatch(NamedTuple):
    """A whole batch of one bucket: which bucket, and how many of its batches lie before this one in its own order."""

    bucket: int
    number: int


class BucketSchedule:
    """The batches of all buckets, in the order of optimizer steps.

    A bucket's samples follow each other without end, once in each of its passes, and every `batch_size` of them are a
    batch. As many samples as there are make an epoch: by its end, a bucket of n has had all batches that its n samples
    of each epoch so far fill, and what fills none waits for the next epoch. An epoch's batches come in a random order.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int) -> None:
        """
        Args:
            counts: the samples of each bucket, at least one in all.
            batch_size: the samples of an optimizer step.
        """
        self._counts, self._batch_size, self._seed = counts, batch_size, seed
        self._order = lru_cache(maxsize=2)(self._order_of)  # steps are prepared ahead, over an epoch's end too
        self.at = lru_cache(maxsize=_STEPS_KEPT)(self._batch_of)  # asked for by every row of a step
        """The batch of a step, counted from 0."""

    def _batch_of(self, step: int) -> BucketBatch:
        epoch = self._epoch_of(step)
        batch = int(self._order(epoch)[step - sum(self._batches_before(epoch))])
        for bucket, (begin, end) in enumerate(
            zip(self._batches_before(epoch), self._batches_before(epoch + 1), strict=True)
        ):
            if batch < end - begin:
                return BucketBatch(bucket, begin + batch)
            batch -= end - begin
        raise AssertionError("the order is one of the epoch's batches")

    def _epoch_of(self, step: int) -> int:
        """The last one that begins with this step or before."""
        samples, buckets = sum(self._counts), len(self._counts)
        # Before an epoch come at most as many batches as its samples fill, and less than one of each bucket fewer.
        earliest, latest = step * self._batch_size // samples, (step + buckets) * self._batch_size // samples
        epochs = range(earliest, latest + 1)
        return earliest - 1 + bisect_right(epochs, step, key=lambda epoch: sum(self._batches_before(epoch)))

    def _batches_before(self, epoch: int) -> list[int]:
        """Of each bucket."""
        return [epoch * count // self._batch_size for count in self._counts]

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64] | KeyedOrder:
        batches = sum(self._batches_before(epoch + 1)) - sum(self._batches_before(epoch))
        return random_order(batches, self._seed, Purpose.BUCKET_ORDER, epoch)
