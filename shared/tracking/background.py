"""A tracker that may fail or hang without a training noticing."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.threads import leave_behind
from shared.untrusted import MIB, foreign_library

logger = logging.getLogger(__name__)

CaptionedImage = tuple[str, np.ndarray]

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds between attempts: a disk or a network is down for minutes
_MOST_ATTEMPTS = 3  # for an entry that a destination which opens well does not take: something is wrong with it itself
_QUIET = (
    600.0  # seconds without a failure after which the next one is tried again soon: nobody reads of it every second
)
_MOST_WAITING = 256 * MIB  # of memory: hundreds of thousands of figures, or some hundred pictures
_SECONDS_FOR_ROOM = 60.0  # for pictures, which take longer to be encoded than to be made
_SECONDS_TO_CLOSE = 120.0  # for what is still to be sent; then a network that hangs is given up

_BYTES_OF_FIGURES = 1000  # about what a dictionary of some ten takes

_GOES_ON = "The training goes on; its figures are in metrics.jsonl, and are sent there too as soon as that works again."


class Destination(Protocol):
    """What each kind of tracker does; `Tracker` says what the arguments are."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def images(self, tag: str, images: Sequence[CaptionedImage], step: int) -> None: ...

    def truncate_after(self, step: int) -> None: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class _Entry:
    """One call of the destination that is still to be made."""

    send: Callable[[Destination], None]
    size: int
    is_picture: bool = False
    attempts: int = 0


class BackgroundTracker:
    """Hands everything to a destination in a thread of its own, in order; nobody waits for it.

    Where the destination fails, the log says so once; it is closed, and opened again after a pause that grows. What is
    logged meanwhile waits, within bounds (pictures make way first), and the log says at the end how much is missing.
    """

    def __init__(self, name: str, open_destination: Callable[[], Destination]):
        """Opens the destination for the first time; whatever that raises is raised."""
        self._name, self._open = name, open_destination
        self._destination: Destination | None = open_destination()
        self._waiting: deque[_Entry] = deque()
        self._waiting_size = 0
        self._changed = threading.Condition()
        self._closing = False
        self._failed = False
        self._stalled = False
        self._missing = 0
        self._pause = _FIRST_PAUSE
        self._last_failure = -math.inf
        self._last_attempts = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        figures = dict(metrics)
        self._add(_Entry(lambda destination: destination.log(figures, step), _BYTES_OF_FIGURES))

    def images(self, tag: str, images: Sequence[CaptionedImage], step: int) -> None:
        size = sum(image.nbytes for _, image in images)
        pictures = list(images)
        self._add(_Entry(lambda destination: destination.images(tag, pictures, step), size, is_picture=True))

    def truncate_after(self, step: int) -> None:
        self._add(_Entry(lambda destination: destination.truncate_after(step), 0))

    def close(self) -> None:
        """Wait for what is on its way, within a bound; says what did not get there."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_SECONDS_TO_CLOSE)
        hangs = self._thread.is_alive()
        if hangs:
            leave_behind()
        with self._changed:
            missing = self._missing + len(self._waiting)
        told = [f"{missing} entries are missing there"] if missing else []
        told += ["it did not end in time"] if hangs else []
        if told:
            logger.warning("%s: %s. All figures are in metrics.jsonl", self._name, ", and ".join(told))

    # --- in the caller's thread --------------------------------------------------------------------------------------

    def _add(self, entry: _Entry) -> None:
        with self._changed:
            if entry.is_picture:
                self._wait_for_room(entry)
            self._waiting.append(entry)
            self._waiting_size += entry.size
            while self._waiting_size > _MOST_WAITING and len(self._waiting) > 1:
                later = list(self._waiting)[1:]  # the first is on its way
                self._drop(next((one for one in later if one.is_picture), later[0]))
            self._changed.notify_all()

    def _wait_for_room(self, entry: _Entry) -> None:
        """Under the lock: a destination that works is only busy; one that fails or hangs is not waited for."""

        def is_room() -> bool:
            fits = not self._waiting or self._waiting_size + entry.size <= _MOST_WAITING
            return fits or self._failed or self._stalled

        if not self._changed.wait_for(is_room, _SECONDS_FOR_ROOM):
            self._stalled = True

    def _drop(self, entry: _Entry) -> None:
        """Under the lock: leave an entry out."""
        self._waiting.remove(entry)
        self._waiting_size -= entry.size
        self._missing += 1

    # --- in the tracker's own ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            try:
                with foreign_library(f"{self._name} cannot be written to", _GOES_ON):
                    self._send(entry)
            except (ValueError, MemoryError) as error:
                self._after_failure(entry, error)
            else:
                self._after_success(entry)
        self._leave()

    def _next(self) -> _Entry | None:
        """The oldest entry, which stays in the queue until it is sent; None when all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting[0] if self._waiting else None

    def _send(self, entry: _Entry) -> None:
        if self._destination is None:
            self._destination = self._open()
        entry.attempts += 1
        entry.send(self._destination)

    def _after_success(self, entry: _Entry) -> None:
        with self._changed:
            self._take(entry)
            missing, failed = self._missing, self._failed
        if failed:
            self._failed = False
            logger.info("%s is written to again; %d entries are missing there", self._name, missing)

    def _take(self, entry: _Entry) -> None:
        """Under the lock: an entry that is sent. It may have had to make way meanwhile."""
        self._stalled = False
        self._changed.notify_all()
        if self._waiting and self._waiting[0] is entry:
            self._waiting.popleft()
            self._waiting_size -= entry.size

    def _after_failure(self, entry: _Entry, error: Exception) -> None:
        if not self._failed:
            with self._changed:
                self._failed = True
                self._changed.notify_all()
            logger.warning("%s", error)
        self._leave()
        now = time.monotonic()
        if now - self._last_failure > _QUIET:
            self._pause = _FIRST_PAUSE
        self._last_failure = now
        with self._changed:
            if self._is_hopeless(entry, error) and entry in self._waiting:
                self._drop(entry)
            if self._closing:
                self._last_attempts += 1
                if self._last_attempts >= _MOST_ATTEMPTS:
                    self._missing += len(self._waiting)
                    self._waiting.clear()
                return
            # The end of the run cuts the pause short.
            self._changed.wait_for(lambda: self._closing, self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _is_hopeless(self, entry: _Entry, error: Exception) -> bool:
        """Figures wait for a full disk as long as it takes; a picture, for which there may never be room, does not."""
        is_outage = isinstance(error.__cause__, OSError) and not entry.is_picture
        return entry.attempts >= _MOST_ATTEMPTS and not is_outage

    def _leave(self) -> None:
        """Close the destination, which may not even do that any more."""
        destination, self._destination = self._destination, None
        if destination is None:
            return
        try:
            with foreign_library(f"{self._name} cannot be closed", "Its last entries may be missing."):
                destination.close()
        except (ValueError, MemoryError) as error:
            if not self._failed:
                logger.warning("%s", error)
            self._failed = True
