"""Host-side randomness without hidden state.

Every random number of a training run comes from `generator(seed, purpose, position)`. Nothing is carried from one
call to the next, so a run that resumes, runs on other hosts or uses the other backend draws the same numbers.
"""

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

from shared.user_errors import UserError

_WORD = 2**64


class Purpose(IntEnum):
    """What a random number is for. The values key the streams: changing one changes every run, so only ever add."""

    ORDER = 1
    CAPTION = 2
    CAPTION_DROPOUT = 3
    VAE_NOISE = 4
    NOISE = 5
    TIMESTEP = 6
    INITIALISATION = 7
    VALIDATION = 8
    CIRCLES = 9
    SUBSET = 10
    SHARD_ORDER = 11
    SHUFFLE_BUFFER = 12
    DEMO = 13
    HELD_OUT = 14
    EVALUATION = 15
    FLIP = 16
    CROP = 17
    CONDITION = 18
    BUCKET_ORDER = 19


def generator(seed: int, purpose: Purpose | str, position: int) -> np.random.Generator:
    """A generator of its own for one (seed, purpose, position).

    Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): (seed, purpose) is its key and
    `position` the upper half of its 256-bit counter, so each stream has 2**128 blocks before it would meet the next.

    Args:
        seed: the run's seed, 0 ≤ seed < 2**64.
        purpose: a `Purpose`, or its name in any case ("noise").
        position: what the draw belongs to, 0 ≤ position < 2**64: a global sample position, an epoch, an index.

    Raises:
        UserError: for a seed or position out of range, or an unknown purpose.
    """
    purpose = _purpose(purpose)
    _check_word("seed", seed)
    _check_word("position", position)
    key = _Key(np.array([seed, purpose], dtype=np.uint64))
    counter = np.array([0, 0, position, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key, counter=counter))  # type: ignore[arg-type]  # any ISeedSequence is taken


class _Key(ISeedSequence):
    """A key as it is. (Given one by its own name, numpy asks the system for entropy that it does not use.)"""

    def __init__(self, words: npt.NDArray[np.uint64]) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[Any]:
        assert n_words == len(self._words)
        assert dtype is np.uint64
        return self._words


def _purpose(purpose: Purpose | str) -> Purpose:
    if isinstance(purpose, Purpose):
        return purpose
    if isinstance(purpose, str) and purpose.upper() in Purpose.__members__:
        return Purpose[purpose.upper()]
    known = ", ".join(Purpose.__members__)
    raise UserError(f"unknown purpose {purpose!r}; use one of {known} (or add one to shared.randomness.Purpose)")


def _check_word(name: str, value: int) -> None:
    if not 0 <= value < _WORD:
        raise UserError(f"{name} is {value}; expected an integer from 0 to 2**64 - 1")
