"""Ends a run between two steps when it is asked to stop, or when nobody can read any more what it says."""

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TextIO

from shared.outgoing.messages import explain

logger = logging.getLogger(__name__)

_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interruption:
    """While entered, the first SIGTERM, SIGHUP or Ctrl-C only sets `requested`; a second Ctrl-C stops at once.

    SIGHUP tells of a lost connection; under nohup it is ignored, and stays so. A closed pipe (`… | head`) counts as the
    signal that it would be for other programs, SIGPIPE, where `forgiving_output` holds the streams.

    `exit_code` is what the process should end with after saving: 130 for Ctrl-C, as shells expect, and 0 for everything
    else: that is how schedulers and preemption ask.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    @property
    def exit_code(self) -> int:
        return 130 if self.requested == signal.SIGINT else 0

    def say_stopped(self) -> None:
        """In the log, after the state is saved."""
        reason = "another process" if self.requested is None else self.requested.name
        logger.info("Stopped by %s; continue with --resume_from_checkpoint latest", reason)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # launchers repeat and translate signals: the first says what was meant
        self.requested = signal.Signals(number)

    def _pipe_closed(self) -> None:
        if self.requested is None:
            self.requested = signal.SIGPIPE

    def __enter__(self) -> "Interruption":
        for stream in _forgiving_streams():
            stream.when_closed = self._pipe_closed
            if stream.is_closed:
                self._pipe_closed()
        for number in _WATCHED:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        for stream in _forgiving_streams():
            stream.when_closed = _go_on  # the result is saved after the loop


INTERRUPTED = 130
"""The exit code after Ctrl-C."""


def exit_code_of(work: Callable[[], int], *, interrupted: str = "Interrupted.") -> int:
    """What a command ends with: the code of its work; 2 after a mistake of the user, which is told; 130 after Ctrl-C,
    where `interrupted` is; 1 after a defect, with its traceback."""
    with forgiving_output():
        try:
            return work()
        except ValueError as error:
            return explain(error)
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            return INTERRUPTED


@contextmanager
def forgiving_output() -> Iterator[None]:
    """For the time of a program: what it prints and logs cannot end it.

    A closed pipe, a lost terminal, a full disk under a redirected log: the text is lost and the program goes on. Only
    the closed pipe is also a request to stop: at once while nothing is at stake, and of `Interruption` during a run.
    """
    streams = sys.stdout, sys.stderr
    forgiving = [ForgivingStream(stream) for stream in streams]
    sys.stdout, sys.stderr = forgiving
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in forgiving:
            stream.leave()


class ForgivingStream:
    """A text stream whose `write` and `flush` raise no OSError; everything else is the stream's own.

    Attributes:
        is_closed: nobody reads its pipe any more.
        when_closed: what to do when that is found.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.is_closed = False
        self.when_closed = _end_quietly

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def leave(self) -> None:
        """Write what the stream still holds; what cannot be written must not be tried again by the interpreter."""
        self.when_closed = _go_on
        try:
            self._stream.flush()
        except OSError:
            self._to_nowhere()

    def _lost(self, error: OSError) -> None:
        # A full disk may have room again; a reader or a terminal that is gone does not come back.
        if error.errno in (errno.EPIPE, errno.EIO):
            self._to_nowhere()
        if error.errno == errno.EPIPE:
            self.is_closed = True
            self.when_closed()

    def _to_nowhere(self) -> None:
        """Everything that writes to this place, libraries written in other languages too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _forgiving_streams() -> list[ForgivingStream]:
    return [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, ForgivingStream)]


def _end_quietly() -> None:
    """As other programs end of SIGPIPE, but with the exit code of a run that was asked to stop."""
    if threading.current_thread() is threading.main_thread():
        raise SystemExit(0)


def _go_on() -> None:
    pass
