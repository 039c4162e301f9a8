"""A thread pool that never keeps a process alive.

`concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter exits, so a read that hangs would hang
Ctrl-C too. These are daemon threads.
"""

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from shared.user_errors import UserError

_MOST = 16  # more than this many decode faster than any one device trains


def threads_beside_accelerators(processes_here: int = 1) -> int:
    """How many threads of each process prepare batches: all the machine's processors have, but one for each process.

    Args:
        processes_here: that train on this machine.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST, processors // processes_here - 1))


Result = TypeVar("Result")

_Task = tuple[Future[Any], Callable[[], Any]]


class Workers:
    """`count` threads that run what is submitted, in order of submission."""

    def __init__(self, count: int) -> None:
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"data-{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[[], Result]) -> Future[Result]:
        """Run `function` in a thread. What it raises, the future's `result()` raises."""
        if self._closed.is_set():
            raise UserError("this loader was closed; make a new one to read more batches")
        future: Future[Result] = Future()
        self._tasks.put((future, function))
        return future

    def close(self) -> None:
        """Drop what has not begun and let the threads end after what they are doing. Does not wait for them."""
        self._closed.set()
        for _ in self._threads:
            self._tasks.put(None)

    def _work(self) -> None:
        while self._did_next():
            pass

    def _did_next(self) -> bool:
        """Nothing is held of what was done: the thread may wait for long."""
        task = self._tasks.get()
        if task is None:
            return False
        future, function = task
        if self._closed.is_set():
            future.cancel()
        if not future.set_running_or_notify_cancel():
            return True
        try:
            result = function()
        except BaseException as error:  # whatever it is belongs to the thread that asks for the result
            future.set_exception(error)
        else:
            future.set_result(result)
        return True
