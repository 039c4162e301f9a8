"""Reports that are made in a process of their own, so that the compiler's end is not ours."""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from flax_trainer.base_models import ModelConfigs
from flax_trainer.compile_report.report import Report, compile_report
from flax_trainer.compile_report.targets import Target
from shared.config import TrainConfig
from shared.diffusion.schedule import NoiseSchedule
from shared.user_errors import is_written_for_users


class CompilerCrashedError(ValueError):
    """The TPU compiler took its process with it: it has crashed, or the system has ended it."""

    def __init__(self) -> None:
        super().__init__(
            "The TPU compiler crashed, or was killed because this machine's memory is full (above is what it said). "
            "Give another --train_batch_size, or more memory, swap space for instance."
        )


def compile_report_apart(
    config: TrainConfig, configs: ModelConfigs, schedule: NoiseSchedule, target: Target, *, from_cache: bool
) -> Report:
    """`compile_report`, whose process gives all its memory back at the end, and can be interrupted at any time.

    Raises:
        CompilerCrashedError: the compiler has ended its process. Seen with libtpu 0.0.42.1, which at some sizes of a
            convolution runs out of stack.
        ValueError: as `compile_report` does.
    """
    context, ctrl_c_is_ours = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(1, context, initializer=signal.signal, initargs=ctrl_c_is_ours) as pool:
        try:
            outcome = pool.submit(
                _report_or_error, compile_report, config, configs, schedule, target, from_cache=from_cache
            ).result()
        except BrokenProcessPool as error:
            raise CompilerCrashedError from error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.kill()  # while it compiles it does not listen
            raise
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome


def _report_or_error(report: Callable[..., Report], *arguments: Any, from_cache: bool) -> Report | ValueError:
    """Errors that are written for users are returned: no traceback comes with them, which would tell them apart."""
    try:
        return report(*arguments, from_cache=from_cache)
    except ValueError as error:
        if is_written_for_users(error):
            return error
        raise
