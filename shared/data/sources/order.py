"""Random orders of a data set's samples: drawn and held where that costs nothing, computed where it would.

Of ten million samples a held order takes 80 MB and a second for every epoch, and every start of a run waits for it.
"""

import copy
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from shared.randomness import Purpose, generator

LARGEST_HELD = 2**20
"""Samples whose order is drawn whole: 8 MB, in some 40 ms. That of more is computed, sample by sample."""

_ROUNDS = 8
_WORD = 2**64 - 1


class KeyedOrder:
    """A permutation of 0 to count - 1 as a pure function of the place: nothing is held.

    A Feistel network of `_ROUNDS` rounds over the smallest power of two that has room, with cycle walking: a value
    beyond the count goes through it again. Luby and Rackoff 1988, "How to construct pseudorandom permutations from
    pseudorandom functions"; Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 3.
    """

    def __init__(self, count: int, seed: int, purpose: Purpose, position: int) -> None:
        self._count = self._length = count
        bits = max(2, (count - 1).bit_length())
        self._low_bits, self._high_bits = bits // 2, bits - bits // 2
        keys = generator(seed, purpose, position).integers(2**64, size=_ROUNDS, dtype=np.uint64)
        self._keys = [int(key) for key in keys]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self._length:
            raise IndexError(place)
        value = self._permuted(place)
        while value >= self._count:
            value = self._permuted(value)
        return value

    def __iter__(self) -> Iterator[int]:
        return map(self.__getitem__, range(self._length))

    def beginning(self, length: int) -> "KeyedOrder":
        """Its first places alone."""
        shorter = copy.copy(self)
        shorter._length = min(length, self._length)
        return shorter

    def _permuted(self, value: int) -> int:
        # The halves may differ by a bit: each round changes one by the other, in turns.
        low, high = value & ((1 << self._low_bits) - 1), value >> self._low_bits
        low_mask, high_mask = (1 << self._low_bits) - 1, (1 << self._high_bits) - 1
        for even, odd in zip(self._keys[::2], self._keys[1::2], strict=True):
            low ^= _mixed(high ^ even) & low_mask
            high ^= _mixed(low ^ odd) & high_mask
        return high << self._low_bits | low


class AllBut:
    """0 to count - 1 without some, in rising order."""

    def __init__(self, count: int, left_out: npt.NDArray[np.int64]) -> None:
        self._length = count - len(left_out)
        # How many that stay come before each that is left out.
        self._before = np.sort(left_out) - np.arange(len(left_out))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self._length:
            raise IndexError(place)
        return place + int(np.searchsorted(self._before, place, side="right"))


Indices = npt.NDArray[np.int64] | KeyedOrder | AllBut


def random_order(count: int, seed: int, purpose: Purpose, position: int) -> npt.NDArray[np.int64] | KeyedOrder:
    """Every index below `count` once, in an order of (seed, purpose, position)."""
    if count > LARGEST_HELD:
        return KeyedOrder(count, seed, purpose, position)
    return generator(seed, purpose, position).permutation(count)


def beginning(order: npt.NDArray[np.int64] | KeyedOrder, length: int) -> npt.NDArray[np.int64] | KeyedOrder:
    """The first places of an order, without what comes after them."""
    return order.beginning(length) if isinstance(order, KeyedOrder) else order[:length].copy()


def is_computed(count: int) -> bool:
    """Whether the order of so many samples is computed, place by place."""
    return count > LARGEST_HELD


def _mixed(word: int) -> int:
    """The last step of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
