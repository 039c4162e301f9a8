"""What the profiling flags ask for: traces of some steps and of the last validation, and profiles of device memory.

Traces lie in `OUTPUT_DIR/LOGGING_DIR/profile_steps` and `…/profile_validation`, where TensorBoard's Profile tab finds
them beside the run's figures; memory profiles in `OUTPUT_DIR`, as diffusers' script leaves them, for the pprof program.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from flax_trainer.profiling.trace_parts import name_parts
from shared.config import TrainConfig
from shared.untrusted import foreign_library
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

# The first step may compile, and the allocator settles in the second.
_WARM_UP_STEPS = 2


def profiled_steps(config: TrainConfig, first_step: int, last_step: int) -> range:
    """The optimizer steps to profile, counted from 1, of a run from `first_step` (exclusive) to `last_step`.

    None where a continued run has too few left: the same command must be able to finish what it began.

    Raises:
        UserError: the run would end before they do.
    """
    if config.profile_steps == 0:
        return range(0)
    needed = _WARM_UP_STEPS + config.profile_steps
    if last_step - first_step >= needed:
        begin = first_step + 1 + _WARM_UP_STEPS
        return range(begin, begin + config.profile_steps)
    if first_step == 0:
        raise UserError(
            f"--profile_steps {config.profile_steps} needs a run of {needed} steps, because the first "
            f"{_WARM_UP_STEPS} are not like the others and left out; this one has {last_step}. Lower --profile_steps "
            "or raise --max_train_steps."
        )
    logger.warning(
        "--profile_steps %d: nothing is profiled, for %d steps are left and %d would be needed",
        *(config.profile_steps, last_step - first_step, needed),
    )
    return range(0)


class Profiler:
    """Called by the loop at every step and validation; `close` ends a trace that an interruption left open.

    Of several hosts, the first profiles its own devices: they all run the same program. A profile that cannot be made
    or written is a warning, and the training goes on.
    """

    def __init__(self, config: TrainConfig, steps: range, last_step: int, step_program: Callable[[], str]):
        """For these steps, counted from 1; `step_program` tells the compiled step in XLA's notation."""
        writes = jax.process_index() == 0
        self._steps = steps if writes else range(0)
        self._validated_step = last_step if config.profile_validation and writes else None
        self._with_memory = config.profile_memory and writes
        self._output_dir = Path(config.output_dir)
        self._traces = self._output_dir / config.logging_dir
        self._tracing: Path | None = None
        self._step_program = step_program

    def before_step(self, step: int, running: Any) -> None:
        """`running` holds arrays of the steps before, which must not reach into the trace."""
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(running)
            self._start(self._traces / "profile_steps")

    def after_step(self, step: int, running: Any) -> None:
        """`running` holds arrays of this step, which must be in the trace to its end."""
        if self._steps and step == self._steps[-1]:
            jax.block_until_ready(running)
            folder = self._stop()
            if folder is not None and jax.default_backend() == "cpu":
                with _only_watching("The names of a trace's parts"):
                    (trace,) = newest(folder).glob("*.xplane.pb")
                    name_parts(trace, self._step_program())

    def before_validation(self, step: int) -> None:
        """The steps are finished by then."""
        if step == self._validated_step:
            self._start(self._traces / "profile_validation")

    def after_validation(self, step: int) -> None:
        """Whatever a validation computes is on the host when it ends."""
        if step == self._validated_step:
            self._stop()

    def profile_memory(self, moment: str) -> None:
        """What the local devices hold at this moment ("initial" or "final")."""
        if self._with_memory:
            file = self._output_dir / f"memory_{moment}.prof"
            with _only_watching("A profile of device memory"):
                jax.profiler.save_device_memory_profile(str(file))
                logger.info("What is in device memory is in %s; look at it with pprof -web %s", file, file)

    def close(self) -> None:
        self._stop()

    def _start(self, folder: Path) -> None:
        # Calls of Python functions would be most of the trace, and slow down what is measured.
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with _only_watching("A trace"):
            jax.profiler.start_trace(str(folder), profiler_options=options)
            self._tracing = folder

    def _stop(self) -> Path | None:
        """The folder of the trace; None where there is none."""
        folder, self._tracing = self._tracing, None
        if folder is None:
            return None
        with _only_watching("A trace"):
            jax.profiler.stop_trace()
            logger.info(
                "A trace is in %s; look at it with tensorboard --logdir %s, in the Profile tab", folder, self._traces
            )
            return folder
        return None


@contextmanager
def _only_watching(what: str) -> Iterator[None]:
    try:
        with foreign_library(f"{what} cannot be written", "The training goes on without."):
            yield
    except ValueError as error:
        logger.warning("%s", error)


def newest(folder: Path) -> Path:
    """The folder of the last trace that was written to `folder`; JAX names each by its time."""
    return max((folder / "plugins" / "profile").iterdir())
