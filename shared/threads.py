"""Work that goes on beside the caller's."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

Result = TypeVar("Result")

_left_behind = threading.Event()


def in_background(function: Callable[..., Result], *args: Any) -> "Future[Result]":
    """Call a function in a thread of its own. What it raises, the future's `result()` raises.

    The interpreter ends after the thread, because it cannot take the thread out of a compiler without crashing.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            result = function(*args)
        except BaseException as error:  # whatever it is belongs to the thread that asks for the result
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, name=getattr(function, "__name__", "background")).start()
    return future


def leave_behind() -> None:
    """To be called where threads of a library hang, or wait for what does not come: `end_process` waits for none."""
    _left_behind.set()


def end_process(exit_code: int) -> NoReturn:
    """End the program as `sys.exit` does, or at once where threads are left behind, which that would wait for."""
    if _left_behind.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
