"""What `--profile_steps` and `--profile_validation` ask for: traces of some steps and of the last validation.

They lie in `OUTPUT_DIR/LOGGING_DIR/profile_steps` and `…/profile_validation`, where TensorBoard's Profile tab finds
them beside the run's figures.
"""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import profile, record_function

from shared.config import TrainConfig
from shared.profiling.only_watching import only_watching, say_where
from torch_trainer.profiling.device_time import device_time
from torch_trainer.profiling.kineto import read_trace
from torch_trainer.profiling.tensorboard_trace import write_for_tensorboard


class _Tracing(NamedTuple):
    profiler: profile
    folder: Path


class Profiler:
    """Called by the loop at every step and validation; `close` ends a trace that an interruption left open.

    Of several processes, the main one profiles its own device: they all do the same. A profile that cannot be made or
    written is a warning, and the training goes on.
    """

    def __init__(self, config: TrainConfig, steps: range, last_step: int, *, is_main: bool):
        """For these steps, counted from 1."""
        self._steps = steps if is_main else range(0)
        self._validated_step = last_step if config.profile_validation and is_main else None
        self._traces = Path(config.output_dir) / config.logging_dir
        self._tracing: _Tracing | None = None
        self._step = ExitStack()

    def before_step(self, step: int) -> None:
        """What the devices still do of the steps before is not to reach into the trace."""
        if self._steps and step == self._steps[0]:
            self._start("profile_steps")
        if step in self._steps:
            self._step.enter_context(record_function(f"train {step}"))

    def after_step(self, step: int) -> bool:
        """Whether a trace was written, which takes its time. It holds the steps to their ends on the devices."""
        self._step.close()
        return bool(self._steps) and step == self._steps[-1] and self._stop(len(self._steps))

    def before_validation(self, step: int) -> None:
        if step == self._validated_step:
            self._start("profile_validation")

    def after_validation(self, step: int) -> None:
        """After its last figure and picture are on the host."""
        if step == self._validated_step:
            self._stop()

    def close(self) -> None:
        self._step.close()
        self._stop()

    def _start(self, name: str) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its own messages, such as that it begins, are for developers
        with only_watching("A trace"):
            _finish_work()
            profiler = profile()
            profiler.start()
            self._tracing = _Tracing(profiler, self._traces / name)

    def _stop(self, whole_steps: int = 0) -> bool:
        tracing, self._tracing = self._tracing, None
        if tracing is None:
            return False
        with only_watching("A trace"):
            _finish_work()
            tracing.profiler.stop()
            tracing.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=tracing.folder) as temporary:
                exported = Path(temporary) / "trace.json"
                tracing.profiler.export_chrome_trace(str(exported))
                trace = read_trace(exported)
            write_for_tensorboard(trace, tracing.folder)
            if whole_steps:
                device_time(trace, whole_steps).tell(tracing.folder)
            say_where(tracing.folder, self._traces)
        return True


def _finish_work() -> None:
    """Wait for what the device was told to do."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
