"""What the profiling flags ask for: traces of some steps and of the last validation, and profiles of device memory.

Traces lie in `OUTPUT_DIR/LOGGING_DIR/profile_steps` and `…/profile_validation`, where TensorBoard's Profile tab finds
them beside the run's figures; memory profiles in `OUTPUT_DIR`, as diffusers' script leaves them, for the pprof program.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from flax_trainer.profiling.device_time import device_time
from flax_trainer.profiling.trace_parts import name_parts
from shared.config import TrainConfig
from shared.profiling.only_watching import only_watching, say_where

logger = logging.getLogger(__name__)


class Profiler:
    """Called by the loop at every step and validation; `close` ends a trace that an interruption left open.

    Of several hosts, the first profiles its own devices: they all run the same program. A profile that cannot be made
    or written is a warning, and the training goes on.
    """

    def __init__(self, config: TrainConfig, steps: range, last_step: int, step_program: Callable[[], str]):
        """For these steps, counted from 1; `step_program` tells the compiled step in XLA's notation,
        where there is but one."""
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
            if folder is not None:
                with only_watching("The names of a trace's parts"):
                    self._tell_parts(folder)

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
            with only_watching("A profile of device memory"):
                jax.profiler.save_device_memory_profile(str(file))
                logger.info("What is in device memory is in %s; look at it with pprof -web %s", file, file)

    def close(self) -> None:
        self._stop()

    def _tell_parts(self, folder: Path) -> None:
        program = self._step_program()
        if not program:  # operations of several programs have the same names
            return
        (trace,) = newest(folder).glob("*.xplane.pb")
        device_time(trace, program, len(self._steps)).tell(folder)
        if jax.default_backend() == "cpu":
            name_parts(trace, program)

    def _start(self, folder: Path) -> None:
        # Calls of Python functions would be most of the trace, and slow down what is measured.
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with only_watching("A trace"):
            jax.profiler.start_trace(str(folder), profiler_options=options)
            self._tracing = folder

    def _stop(self) -> Path | None:
        """The folder of the trace; None where there is none."""
        folder, self._tracing = self._tracing, None
        if folder is None:
            return None
        with only_watching("A trace"):
            jax.profiler.stop_trace()
            say_where(folder, self._traces)
            return folder
        return None


def newest(folder: Path) -> Path:
    """The folder of the last trace that was written to `folder`; JAX names each by its time."""
    return max((folder / "plugins" / "profile").iterdir())
