"""Work that goes on beside the caller's."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


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
