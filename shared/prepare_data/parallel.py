"""Work in threads, whose results come in the order of what was asked for."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from shared.data.workers import Workers

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 16
_AHEAD = 2  # results of each thread, which wait for those before them


def threads_of(asked_for: int | None) -> int:
    """--num_workers, or one for every processor."""
    return min(_MOST, os.cpu_count() or 1) if asked_for is None else asked_for


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`map` in threads; with none, in the caller's. What the function raises, comes in its place."""
    if not threads:
        yield from map(function, items)
        return
    workers, pending = Workers(threads), deque[tuple[Future[None], list[Result]]]()
    try:
        for item in items:
            if len(pending) >= _AHEAD * threads:
                yield _result(*pending.popleft())
            result: list[Result] = []
            pending.append((workers.submit(partial(_keep, function, item, result)), result))
        while pending:
            yield _result(*pending.popleft())
    finally:
        workers.close()


def _keep(function: Callable[[Item], Result], item: Item, result: list[Result]) -> None:
    result.append(function(item))


def _result(future: Future[None], result: list[Result]) -> Result:
    future.result()
    return result[0]
