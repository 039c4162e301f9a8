"""The batches of buckets: told for any step alone, and over the steps every sample once in each pass."""

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.buckets.schedule import BucketSchedule

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)
BATCH_SIZES = st.integers(1, 12)


def queues(counts: list[int], batch_size: int, epochs: int) -> list[list[int]]:
    """How many whole batches each bucket has given by the end of each epoch, where its samples wait in a queue."""
    waiting, given_out, ends = [0] * len(counts), [0] * len(counts), []
    for _ in range(epochs):
        for bucket, count in enumerate(counts):
            for _ in range(count):
                waiting[bucket] += 1
                if waiting[bucket] == batch_size:
                    waiting[bucket] = 0
                    given_out[bucket] += 1
        ends.append(list(given_out))
    return ends


@settings(max_examples=150)
@given(COUNTS, BATCH_SIZES, st.integers(0, 2**32))
def test_each_epoch_has_the_batches_that_its_samples_fill(counts: list[int], batch_size: int, seed: int) -> None:
    schedule, step, taken = BucketSchedule(counts, batch_size, seed), 0, Counter[int]()
    for ends in queues(counts, batch_size, epochs=6):
        epoch = [schedule.at(step + place) for place in range(sum(ends) - sum(taken.values()))]
        for bucket, end in enumerate(ends):
            numbers = sorted(batch.number for batch in epoch if batch.bucket == bucket)
            assert numbers == list(range(taken[bucket], end))
            taken[bucket] = end
        step += len(epoch)


@given(COUNTS, BATCH_SIZES, st.integers(0, 10**12))
def test_a_step_is_told_without_those_before_it(counts: list[int], batch_size: int, step: int) -> None:
    """As by one that was asked for its neighbours first; and near to where so many samples lead."""
    walked = BucketSchedule(counts, batch_size, 3)
    for neighbour in range(max(0, step - 5), step):
        walked.at(neighbour)
    bucket, number = BucketSchedule(counts, batch_size, 3).at(step)
    assert walked.at(step) == (bucket, number)
    passes = step * batch_size / sum(counts)
    assert abs(number * batch_size / counts[bucket] - passes) <= 2 + (len(counts) + 1) * batch_size / counts[bucket]


def test_buckets_take_turns_at_random() -> None:
    schedule = BucketSchedule([400, 400], 4, seed=0)
    first, second = ([schedule.at(step).bucket for step in range(begin, begin + 200)] for begin in (0, 200))
    assert sum(first) == sum(second) == 100
    assert 60 < sum(one != other for one, other in itertools.pairwise(first)) < 140
    assert first != second
    assert first != [BucketSchedule([400, 400], 4, seed=1).at(step).bucket for step in range(200)]


def test_of_millions_of_samples_the_order_is_computed() -> None:
    schedule = BucketSchedule([6_000_000, 3_000_000], 2, seed=0)
    steps = range(10**9, 10**9 + 1000)
    assert len({schedule.at(step) for step in steps}) == 1000
    assert 600 < sum(schedule.at(step).bucket == 0 for step in steps) < 730
