"""The one interface to all trackers, and which of them a run uses."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from shared.config import TrainConfig
from shared.tracking.background import BackgroundTracker, CaptionedImage, Destination
from shared.tracking.metrics_file import METRICS_FILE, MetricsFile
from shared.tracking.tensorboard import TensorBoardTracker, check_tensorboard
from shared.tracking.weights_and_biases import WandbRun, check_wandb
from shared.untrusted import foreign_library, shown
from shared.untrusted.border import reason
from shared.user_errors import UserError

_NAMES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}


class Tracker:
    """Sends everything to all of a run's destinations. Use it in the main process only.

    What is opened by `open_trackers` raises nothing here and keeps nobody waiting: figures only watch a training.
    """

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
        UserError: its package is missing, there is no login, or the project's name is none.
    """
    _check_project_name(config.tracker_project_name)
    if config.report_to == "tensorboard":
        check_tensorboard()
    elif config.report_to == "wandb":
        check_wandb()
    elif config.report_to != "none":
        raise UserError(f"--report_to is {config.report_to!r}; expected tensorboard, wandb or none.")


def open_trackers(config: TrainConfig, run_directory: Path) -> Tracker:
    """The trackers of a run: `run_directory`/metrics.jsonl, continued where it exists, and what `report_to` names.

    Raises:
        UserError: as `check_trackers`, or one of them cannot be opened.
    """
    check_trackers(config)
    try:
        destinations: list[Destination] = [MetricsFile(run_directory / METRICS_FILE)]
    except OSError as error:
        raise UserError(
            f"The figures of the run cannot be written to {shown(run_directory / METRICS_FILE)} ({reason(error)}). If "
            "the disk is full, free some space; or choose another --output_dir."
        ) from error
    open_destination = _destination(config, run_directory)
    if open_destination is not None:
        name = _NAMES[config.report_to]
        with foreign_library(f"--report_to {config.report_to}: {name} cannot be opened", "Or give --report_to none."):
            destinations.append(BackgroundTracker(name, open_destination))
    return Tracker(destinations)


def _destination(config: TrainConfig, run_directory: Path) -> Callable[[], Destination] | None:
    if config.report_to == "tensorboard":
        return partial(TensorBoardTracker, config)
    if config.report_to == "wandb":
        return WandbRun(config, run_directory)
    return None


def _check_project_name(name: str) -> None:
    """It is the name of a folder of events; one with ../ in it would lie anywhere."""
    has_control = any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)
    if name in (".", "..") or has_control or {"/", "\\"} & set(name) or len(name.encode()) > 255:
        raise UserError(
            f"--tracker_project_name is '{shown(name)}'; expected the plain name of one folder, without slashes and of "
            "at most 255 bytes. --logging_dir says where that folder is made."
        )
