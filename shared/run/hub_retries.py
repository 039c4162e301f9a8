"""Asking the Hub again, a few times and with growing pauses, where the same request may succeed a moment later.

huggingface_hub 2.4 itself asks again, 1, 2, 4, 8 and 8 s later, in every part of an upload, and not when it makes a
repository or checks a token; versions before it did not repeat a commit. An upload that is begun anew sends no file
that is there.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from shared.untrusted import shown

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

BEFORE_THE_WORK = (1.0, 2.0, 4.0)
"""Seconds between tries while a user waits for the training to begin."""
AFTER_THE_WORK = (2.0, 4.0, 8.0, 16.0, 32.0)
"""The same when there is something to lose."""

_PASSING_STATUS = (408, 425, 429)  # and all from 500 on
_LASTING = (OfflineModeIsEnabled, FileNotFoundError, PermissionError, ValueError, MemoryError)
_LONGEST_WAIT = 300.0  # seconds: what the Hub counts requests over
_LONGEST_ANSWER = 1000  # characters of what the Hub says is wrong


def retried(ask: Callable[[], Result], pauses: Sequence[float]) -> Result:
    """What it returns, the first time that it does not raise; a pause is longer where the Hub asks for that.

    Raises:
        Exception: what it raised the last time, or what does not pass by itself.
    """
    for number, pause in enumerate(pauses, 1):
        try:
            return ask()
        except Exception as error:  # huggingface_hub and its parts in Rust promise nothing about what they raise
            if not _passes(error):
                raise
            seconds = max(pause, _asked_to_wait(error))
            logger.warning("The Hub: %s. Tried %d times, and again in %.0f s", one_line(error), number, seconds)
        time.sleep(seconds)
    return ask()


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(' '.join(str(error).split()), _LONGEST_ANSWER)}"


def _passes(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in _PASSING_STATUS or status >= 500
    return isinstance(error, HTTPError) or not isinstance(error, _LASTING)


def _asked_to_wait(error: Exception) -> float:
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = str(headers.get("retry-after", ""))
    return min(float(asked), _LONGEST_WAIT) if asked.isascii() and asked.isdigit() else 0.0
