"""Shuffling a stream through a bounded buffer."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from shared.randomness import Purpose, generator

T = TypeVar("T")


def buffered_shuffle(items: Iterable[T], buffer_size: int, seed: int, epoch: int) -> Iterator[T]:
    """Every item once, in an order that (seed, epoch) decides, holding at most `buffer_size` items.

    Each new item takes the place of a random one in the full buffer, which is yielded; the rest follows shuffled.
    A buffer of 1 keeps the order.
    """
    rng = generator(seed, Purpose.SHUFFLE_BUFFER, epoch)
    buffer: list[T] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        chosen = int(rng.integers(buffer_size))
        buffer[chosen], item = item, buffer[chosen]
        yield item
    for index in rng.permutation(len(buffer)):
        yield buffer[index]
