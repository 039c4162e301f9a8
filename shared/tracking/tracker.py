"""The one interface to all trackers, and which of them a run uses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from shared.config import TrainConfig
from shared.tracking.metrics_file import METRICS_FILE, MetricsFile
from shared.tracking.tensorboard import TensorBoardTracker, check_tensorboard
from shared.tracking.weights_and_biases import WandbTracker, check_wandb

CaptionedImage = tuple[str, np.ndarray]


class Destination(Protocol):
    """What each kind of tracker does; `Tracker` says what the arguments are."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def images(self, tag: str, images: Sequence[CaptionedImage], step: int) -> None: ...

    def truncate_after(self, step: int) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Sends everything to all of a run's destinations. Use it in the main process only."""

    def __init__(self, destinations: Sequence[Destination]):
        self._destinations = tuple(destinations)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record figures of an optimizer step."""
        for destination in self._destinations:
            destination.log(metrics, step)

    def images(self, tag: str, images: Sequence[CaptionedImage], step: int) -> None:
        """Record images of an optimizer step: pairs of a caption and a uint8 array [H, W, 3]."""
        for destination in self._destinations:
            destination.images(tag, images, step)

    def truncate_after(self, step: int) -> None:
        """Forget what was recorded past `step`: a resumed run takes those steps again. -1 forgets everything.

        Weights & Biases keeps what it was sent: there a resumed run is a run of its own.
        """
        for destination in self._destinations:
            destination.truncate_after(step)

    def close(self) -> None:
        """Write out whatever is still on its way."""
        for destination in self._destinations:
            destination.close()


def check_trackers(config: TrainConfig) -> None:
    """Whether the tracker that `report_to` names can be used, before any work starts.

    Raises:
        ValueError: its package is missing, or there is no login.
    """
    if config.report_to == "tensorboard":
        check_tensorboard()
    elif config.report_to == "wandb":
        check_wandb()
    elif config.report_to != "none":
        raise ValueError(f"--report_to is {config.report_to!r}; expected tensorboard, wandb or none.")


def open_trackers(config: TrainConfig, run_directory: Path) -> Tracker:
    """The trackers of a run: `run_directory`/metrics.jsonl, continued where it exists, and what `report_to` names.

    Raises:
        ValueError: as `check_trackers`.
    """
    check_trackers(config)
    destinations: list[Destination] = [MetricsFile(run_directory / METRICS_FILE)]
    if config.report_to == "tensorboard":
        destinations.append(TensorBoardTracker(config))
    elif config.report_to == "wandb":
        destinations.append(WandbTracker(config, run_directory))
    return Tracker(destinations)
