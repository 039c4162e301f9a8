"""Objects from front to back, one after another, their ranges read ahead of the reader within a bound of memory."""

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import TypeVar

from shared.data.remote.http_ranges import HttpStream
from shared.data.remote.objects import RemoteObject, open_object
from shared.data.remote.retrying import retried
from shared.data.workers import Workers
from shared.outgoing.redaction import redacted
from shared.untrusted import shown

logger = logging.getLogger(__name__)

PIECE = 8 * 2**20
"""Bytes of a range at most: at 20 ms of latency and a gigabit per second, a quarter of its time is waiting, which
others fill."""

RANGES = 8
"""That are on their way at once."""

_OBJECTS_OPEN = 3  # that which is read, and those after it

Result = TypeVar("Result")


class Readers:
    """The threads that read ranges, for one sequence of objects or several beside each other, which share them.

    Attributes:
        piece: bytes of a range.
        window: ranges of each sequence that are on their way, or wait for its reader.
    """

    def __init__(self, sequences: int = 1) -> None:
        # With what their readers hold, all sequences together take no more memory than one: 72 MiB.
        self.window = max(2, RANGES // sequences)
        self.piece = min(PIECE, (RANGES + 1) * PIECE // (sequences * (self.window + 1)))
        self._threads: Workers | None = None
        self._lock = threading.Lock()

    def submit(self, function: Callable[[], Result]) -> Future[Result]:
        """The threads begin with the first."""
        with self._lock:
            if self._threads is None:
                self._threads = Workers(RANGES)
                weakref.finalize(self, self._threads.close)
        return self._threads.submit(function)

    def close(self) -> None:
        """Which also happens when nothing refers to it any more."""
        if self._threads is not None:
            self._threads.close()


class RemoteStream:
    """One of `RemoteStreams`, to be read until the next is asked for."""

    def __init__(self, pieces: Iterator[bytearray], opening: "Future[RemoteObject | None]") -> None:
        self._pieces, self._opening = pieces, opening
        self._rest = memoryview(b"")
        self._failure: Exception | None = None

    @property
    def size(self) -> int | None:
        """In bytes; None where the server only answers with the whole. Raises RemoteError where it cannot be read."""
        opened = self._opening.result()
        return None if opened is None else opened.size

    def read(self, count: int) -> memoryview:
        """Up to `count` bytes, none only at the end. Raises RemoteError where they cannot be read."""
        while not self._rest:
            if self._failure is not None:  # a generator that raised is over, and would pass for the end
                raise self._failure
            try:
                piece = next(self._pieces, None)
            except Exception as error:
                self._failure = error
                raise
            if piece is None:
                return self._rest
            self._rest = memoryview(piece)
        part, self._rest = self._rest[:count], self._rest[count:]
        return part


class RemoteStreams:
    """The streams of several objects, in their order. While one is read, the ranges after those at hand are on their
    way, the next objects' too. For one thread at a time; leaving its context ends the reading."""

    def __init__(self, addresses: Iterable[str], readers: Readers | None = None) -> None:
        """`readers`: those that others share; of its own without."""
        self._to_open = iter(addresses)
        self._opened: deque[_Ahead] = deque()
        self._readers, self._is_alone = readers or Readers(), readers is None
        self._window = 1  # it grows with what is read, for a reader may want the first sample alone
        self._reading: Generator[bytearray, None, None] | None = None
        self._told = False

    def __enter__(self) -> "RemoteStreams":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_stream()
        for ahead in self._opened:
            ahead.drop()
        if self._is_alone:
            self._readers.close()

    def next(self) -> RemoteStream:
        """That of the next address; what the one before has left is not read."""
        self._end_stream()
        self._fill()
        self._reading = self._pieces(self._opened[0])
        return RemoteStream(self._reading, self._opened[0].opening)

    def _end_stream(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None
            self._opened.popleft().drop()

    def _pieces(self, ahead: "_Ahead") -> Generator[bytearray, None, None]:
        opened = ahead.opening.result()
        if opened is None:
            self._tell_of_no_ranges(ahead.address)
            yield from _from_front_to_back(ahead.address, self._readers.piece)
            return
        beginning = ahead.take_beginning(opened)
        self._grow()
        yield beginning
        while ahead.lacks(opened):  # the place of what was taken is its own: later objects get what it leaves
            self._fill()
            piece = ahead.pieces.popleft().result()
            self._grow()
            yield piece

    def _grow(self) -> None:
        self._window = min(self._readers.window, 2 * self._window)
        self._fill()

    def _fill(self) -> None:
        """Ask for as much as the window has room for, and for what comes first at first."""
        room = self._window - sum(ahead.held for ahead in self._opened)
        for ahead in self._opened:
            room -= ahead.ask(self._readers, room)
        while (room > 0 and len(self._opened) < _OBJECTS_OPEN) or not self._opened:
            address = next(self._to_open, None)
            if address is None:
                return
            opening = self._readers.submit(partial(open_object, address, self._readers.piece))
            self._opened.append(_Ahead(address, opening))
            room -= 1

    def _tell_of_no_ranges(self, address: str) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "%s: its server does not answer with ranges, so that it is read through one connection, from the front "
                "again after every fault",
                shown(redacted(address)),
            )


class _Ahead:
    """What was asked for of one object."""

    def __init__(self, address: str, opening: "Future[RemoteObject | None]") -> None:
        self.address, self.opening = address, opening
        self.pieces: deque[Future[bytearray]] = deque()
        self.holds_beginning = True
        self._asked_up_to: int | None = None

    @property
    def held(self) -> int:
        """Pieces on their way or waiting."""
        return len(self.pieces) + self.holds_beginning

    def take_beginning(self, opened: RemoteObject) -> bytearray:
        """Whose place is free from now on."""
        self.holds_beginning = False
        self._asked_up_to = self._asked_up_to or len(opened.beginning)
        beginning, opened.beginning = opened.beginning, bytearray()
        return beginning

    def lacks(self, opened: RemoteObject) -> bool:
        """Whether there are pieces that were not taken."""
        assert self._asked_up_to is not None
        return bool(self.pieces) or self._asked_up_to < opened.size

    def drop(self) -> None:
        """What was not begun is not wanted any more."""
        self.opening.cancel()
        for piece in self.pieces:
            piece.cancel()

    def ask(self, readers: Readers, most: int) -> int:
        """Ask for the next pieces, and at the end whether it was one object all along; how many those are."""
        if most <= 0 or not self.opening.done() or self.opening.exception() is not None:
            return 0
        opened = self.opening.result()
        if opened is None:
            return 0
        if self._asked_up_to is None:
            self._asked_up_to = len(opened.beginning)
        asked = 0
        while asked < most and self._asked_up_to < opened.size:
            begin, self._asked_up_to = self._asked_up_to, min(opened.size, self._asked_up_to + readers.piece)
            last = self._asked_up_to == opened.size
            self.pieces.append(readers.submit(partial(_read_piece, opened, begin, self._asked_up_to, last)))
            asked += 1
        return asked


def _read_piece(opened: RemoteObject, begin: int, end: int, last: bool) -> bytearray:
    piece = opened.read(begin, end)
    if last:
        opened.check_unchanged()
    return piece


def _from_front_to_back(address: str, piece_bytes: int) -> Iterator[bytearray]:
    stream = HttpStream(address)
    try:
        while True:
            piece = bytearray()
            retried(address, partial(stream.append, piece_bytes, piece))
            if not piece:
                return
            yield piece
    finally:
        stream.close()
