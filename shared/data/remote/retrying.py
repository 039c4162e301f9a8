"""Trying again, a bounded number of times and for a bounded time, what may succeed a moment later."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from shared.data.remote.faults import RemoteError, as_lasting, passes, reason_of
from shared.outgoing.redaction import redacted
from shared.untrusted import shown

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TRIES = 8
LONGEST = 600.0  # seconds of all tries together
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0  # seconds: 32 in all between eight tries
_NAMED_FROM = 3  # tries: one or two faults are nothing to a store


def retried(address: str, attempt: Callable[[float], Result]) -> Result:
    """What an attempt returns, given the seconds that are left to it.

    Between two tries, pauses grow twofold, each shortened at random by up to half, so that hosts do not knock together.

    Raises:
        RemoteError: it failed in a way that lasts, an AbsentError where nothing is there to be read; or too often.
    """
    begun = time.monotonic()
    for number in range(1, TRIES + 1):
        left = LONGEST - (time.monotonic() - begun)
        try:
            return attempt(left)
        except MemoryError:
            raise
        except Exception as error:  # libraries promise nothing about what they raise
            if not passes(error):
                raise as_lasting(address, error) from None
            reason = reason_of(address, error)
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (number - 1)) * random.uniform(0.5, 1)
        if number == TRIES or time.monotonic() - begun + pause > LONGEST:
            raise RemoteError(f"{reason}, after {number} tries")
        if number >= _NAMED_FROM:
            logger.warning(
                "%s: %s; tried %d times, and again in %.1f s", shown(redacted(address)), reason, number, pause
            )
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")
