"""What a process asks of all of them between two steps, so that they do it together."""

import math
import time
from typing import NamedTuple


class Requests(NamedTuple):
    """To stop, with a checkpoint; to save one and go on."""

    stop: bool = False
    save: bool = False


NO_REQUESTS = Requests()


class SavingClock:
    """Asks for a checkpoint when `--checkpointing_seconds` have passed since the last one was begun.

    Of several processes the clock of one decides; those of the others have None for `seconds`.
    """

    def __init__(self, seconds: float | None):
        """Starts the clock."""
        self._seconds = math.inf if seconds is None else seconds
        self.restart()

    def restart(self) -> None:
        """A checkpoint is begun, whatever asked for it."""
        self._begun, self._has_asked = time.monotonic(), False

    def asks(self) -> bool:
        """Whether the time has come; said once, because several processes hear of it a step later."""
        if self._has_asked or time.monotonic() - self._begun < self._seconds:
            return False
        self._has_asked = True
        return True
