"""What a run tells people while it goes on: the banner at its start, the progress bar, the figures of its steps."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from shared.data.views import Size
from shared.tracking import Tracker
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

SpeedFigures = Callable[[float, Sequence[Size]], Mapping[str, float]]
"""What to log beside images per second, made from it and the sizes of the steps that it is of."""


def no_speed_figures(images_per_second: float, sizes: Sequence[Size]) -> Mapping[str, float]:
    """For runs that log none."""
    return {}


def banner(title: str, facts: dict[str, Any]) -> str:
    """Aligned `name  value` lines under a title."""
    width = max(map(len, facts))
    return "\n".join([f"***** {title} *****", *(f"  {name:<{width}}  {value}" for name, value in facts.items())])


class NonFiniteError(UserError):
    """A loss or gradient became infinite or not a number."""


@dataclass
class StepFigures:
    """One optimizer step as the host saw it. `step` counts from 1; times in seconds.

    `finished_at` is a reading of `time.perf_counter`, `loss_scale` float16's after this step, None where none is used;
    `host_to_device` is what the host spent on handing the batch to the devices, None where that is part of the step.
    `size` is the (width, height) of its pictures.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    data_wait: float
    finished_at: float
    loss_scale: float | None = None
    host_to_device: float | None = None
    size: Size = (0, 0)

    def check(self) -> None:
        """Raises NonFiniteError where the loss or the gradient is not finite."""
        if not (math.isfinite(self.loss) and math.isfinite(self.grad_norm)):
            raise NonFiniteError(
                f"The loss or the gradient is no longer finite at step {self.step} (loss {self.loss}, gradient norm "
                f"{self.grad_norm}). The state before that step is kept. Try a lower --learning_rate, a longer "
                "--lr_warmup_steps, or --mixed_precision no; if the data is new, look at the samples of this step."
            )


@dataclass
class StepBreakdown:
    """Where the time of some steps went. The very first step of a run, which compiles, is not for here."""

    steps: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0
    host_to_device: float | None = None

    def add(self, figures: StepFigures, seconds: float) -> None:
        """A step that took so long altogether."""
        self.steps += 1
        self.seconds += seconds
        self.data_wait += figures.data_wait
        if figures.host_to_device is not None:
            self.host_to_device = (self.host_to_device or 0.0) + figures.host_to_device

    def __str__(self) -> str:
        rest = self.seconds - self.data_wait - (self.host_to_device or 0.0)
        parts = {"waiting for data": self.data_wait, "host to device": self.host_to_device, "step": rest}
        shares = [
            f"{name} {_duration(seconds / self.steps)} ({seconds / self.seconds:.0%})"
            for name, seconds in parts.items()
            if seconds is not None
        ]
        return f"{self.steps} steps of {_duration(self.seconds / self.steps)}: {', '.join(shares)}"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


class RunLog:
    """Turns finished steps into a progress bar and one tracker entry every `logging_steps`.

    Attributes:
        last_loss: of the last step.
        images_per_second: of the last entry that had steady steps, those with neither the program's start nor a break
            (validation, saving) on either side, and not the first of pictures of their size, which may compile; until
            there is one, of the last entry's steps as they were.
        seconds_to_first_step: from the start to the end of the first step, None before that.
    """

    def __init__(
        self,
        *,
        tracker: Tracker,
        first_step: int,
        last_step: int,
        global_batch_size: int,
        epoch_size: int | None,
        logging_steps: int,
        shows_progress: bool = True,
        started: float | None = None,
        speed_figures: SpeedFigures = no_speed_figures,
    ) -> None:
        """Draws the progress bar and starts the clock.

        Args:
            epoch_size: samples in an epoch, None for a stream of unknown length.
            shows_progress: whether to draw the bar; of several processes one does.
            started: the reading of `time.perf_counter` when the program began; now, if not given.
            speed_figures: what to log beside images per second.
        """
        now = time.perf_counter()
        self.global_batch_size, self._speed_figures = global_batch_size, speed_figures
        self.last_loss, self.images_per_second = math.nan, math.nan
        self.seconds_to_first_step: float | None = None
        self._tracker, self._last_step = tracker, last_step
        self._epoch_size, self._logging_steps = epoch_size, logging_steps
        self._started = now if started is None else started
        self._breakdown = StepBreakdown()
        self._window: list[StepFigures] = []
        self._window_start, self._last_finished = now, now
        self._steady_sizes, self._steady_seconds = list[Size](), 0.0  # of the window
        self._measured_sizes, self._known_sizes = list[Size](), set[Size]()
        self._follows_break, self._has_been_steady = True, False
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            desc="Steps",
            unit="step",
            dynamic_ncols=True,
            disable=not shows_progress,
        )

    def restart_clock(self) -> None:
        """Leave what happened since the last step (validation, saving) out of the next images-per-second figure.

        Such a break is also the time to say where the time of the steps since the one before went.
        """
        self._log_breakdown()
        self._follows_break = True
        now = time.perf_counter()
        self._window_start += now - self._last_finished
        self._last_finished = now

    def add(
        self, figures: StepFigures, evaluation: Mapping[str, float] | None = None, *, before_break: bool = False
    ) -> None:
        """Record a finished step, with what was measured after it, if anything was.

        A step beside a break says nothing about speed: the last one before it is waited for without another on its way,
        so a device that tells late of every step, for it is busy with the next, seems to take half as long for it (on
        an H200, 177 images per second were told where 96 were true).
        """
        is_new = figures.size not in self._known_sizes
        self._known_sizes.add(figures.size)
        if not (self._follows_break or before_break or is_new):
            self._steady_sizes.append(figures.size)
            self._steady_seconds += figures.finished_at - self._last_finished
        self._follows_break = False
        self._window.append(figures)
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = figures.finished_at - self._started
            logger.info("The first step is done, %.1f s after the start", self.seconds_to_first_step)
        else:
            self._breakdown.add(figures, figures.finished_at - self._last_finished)
        self._last_finished = figures.finished_at
        self.last_loss = figures.loss
        self._bar.update(figures.step - self._bar.n)
        if figures.step % self._logging_steps == 0 or figures.step == self._last_step or evaluation:
            self._write(evaluation or {})
        postfix = {"loss": f"{figures.loss:.4f}", "lr": f"{figures.learning_rate:.2e}"}
        if not math.isnan(self.images_per_second):
            postfix["img/s"] = f"{self.images_per_second:.3g}"
        self._bar.set_postfix(postfix, refresh=False)

    def speed(self) -> dict[str, float]:
        """`images_per_second`, and what is made from it."""
        figures = self._speed_figures(self.images_per_second, self._measured_sizes)
        return {"images_per_second": self.images_per_second, **figures}

    def _write(self, evaluation: Mapping[str, float]) -> None:
        count, step = len(self._window), self._window[-1].step
        if self._steady_sizes:
            self.images_per_second = len(self._steady_sizes) * self.global_batch_size / self._steady_seconds
            self._measured_sizes, self._has_been_steady = self._steady_sizes, True
        elif not self._has_been_steady:
            self._measured_sizes = [figures.size for figures in self._window]
            self.images_per_second = count * self.global_batch_size / (self._last_finished - self._window_start)
        entry = {
            "loss": math.fsum(figures.loss for figures in self._window) / count,
            "grad_norm": math.fsum(figures.grad_norm for figures in self._window) / count,
            "learning_rate": self._window[-1].learning_rate,
            **self.speed(),
            "data_wait": math.fsum(figures.data_wait for figures in self._window) / count,
        }
        if self._window[-1].loss_scale is not None:
            entry["loss_scale"] = self._window[-1].loss_scale
        copying = [figures.host_to_device for figures in self._window if figures.host_to_device is not None]
        if copying:
            entry["host_to_device"] = math.fsum(copying) / count
        if self._epoch_size is not None:
            entry["epoch"] = step * self.global_batch_size / self._epoch_size
        self._tracker.log({**entry, **evaluation}, step)
        self._window.clear()
        self._window_start = self._last_finished
        self._steady_sizes, self._steady_seconds = [], 0.0

    def close(self) -> None:
        """Write the steps since the last entry too: an interrupted run ends between two of them."""
        if self._window:
            self._write({})
        self._bar.close()
        self._log_breakdown()

    def _log_breakdown(self) -> None:
        if self._breakdown.steps:
            logger.info("%s", self._breakdown)
        self._breakdown = StepBreakdown()
