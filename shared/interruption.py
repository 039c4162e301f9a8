"""Ends a run between two steps when it is asked to stop."""

import signal
from types import FrameType, TracebackType


class Interruption:
    """While entered, the first SIGTERM or Ctrl-C only sets `requested`; a second Ctrl-C stops at once.

    `exit_code` is what the process should end with after saving: 0 for SIGTERM, the way schedulers and preemption ask,
    130 for Ctrl-C, as shells expect.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    @property
    def exit_code(self) -> int:
        return 130 if self.requested == signal.SIGINT else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # launchers repeat and translate signals: the first says what was meant
        self.requested = signal.Signals(number)

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
