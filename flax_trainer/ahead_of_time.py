"""Compiling while other work goes on."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import jax

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Compilable(Protocol):
    """What `jax.jit` and `jax.pmap` return."""

    def __call__(self, *args: Any) -> Any: ...

    def lower(self, *args: Any) -> jax.stages.Lowered: ...


class CompiledAhead:
    """A jitted or pmapped function that is compiled once, in a thread of its own, for arguments of known shapes.

    Without `compile_for` it is compiled when it is first called, by itself.

    A compiler works for minutes without Python's lock: the data threads and whoever calls this go on meanwhile, and
    signals are heard.
    """

    def __init__(self, function: Compilable):
        self._function = function
        self._compiled: Future[jax.stages.Compiled] | None = None

    def compile_for(self, *example: Any) -> None:
        """Begin. Only shapes, dtypes and placement of the example's arrays count; none of them is kept."""
        self._compiled = in_background(self._compile, *map(without_values, example))

    def __call__(self, *args: Any) -> Any:
        """Raises whatever compiling raised."""
        return self._function(*args) if self._compiled is None else self._compiled.result()(*args)

    def text(self) -> str:
        """The compiled program in XLA's notation; empty without `compile_for`."""
        return "" if self._compiled is None else self._compiled.result().as_text() or ""

    def close(self) -> None:
        """Say so where an error will not end the process at once."""
        if self._compiled is not None and not self._compiled.done():
            logger.info("The training step is still being compiled, and cannot be stopped: the process ends after it")

    def _compile(self, *example: Any) -> jax.stages.Compiled:
        started = time.perf_counter()
        compiled = self._function.lower(*example).compile()
        logger.info("The training step is compiled (%.1f s)", time.perf_counter() - started)
        return compiled


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


def without_values(tree: Any) -> Any:
    """A tree of arrays as `jax.ShapeDtypeStruct`s, placed as the arrays are."""

    def shape(value: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=getattr(value, "sharding", None))

    return jax.tree.map(shape, tree)
