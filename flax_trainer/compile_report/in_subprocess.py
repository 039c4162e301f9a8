"""Reports that are made in a process of their own, so that the compiler's end is not ours."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from shared.user_errors import UserError

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


class CompilerCrashedError(UserError):
    """The TPU compiler took its process with it: it has crashed, or the system has ended it."""

    def __init__(self) -> None:
        super().__init__(
            "The TPU compiler crashed, or was killed because this machine's memory is full (above is what it said). "
            "Give another --train_batch_size, or more memory, swap space for instance."
        )


def in_subprocess(report: Callable[Arguments, Made], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
    """A report whose process gives all its memory back at the end, and can be interrupted at any time.

    Raises:
        CompilerCrashedError: the compiler has ended its process. Seen with libtpu 0.0.42.1, which at some sizes of a
            convolution runs out of stack.
        UserError: as the report's function does.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            with _ctrl_c_waits():  # a process that is only half started could not be found and ended
                made = pool.submit(report, *args, **kwargs)
            return made.result()
        except BrokenProcessPool as error:
            raise CompilerCrashedError from error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.kill()  # while it compiles it does not listen
            raise


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C is heard at the end of the block; processes and threads that start in it never hear it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
