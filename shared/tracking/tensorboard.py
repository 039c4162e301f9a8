"""TensorBoard event files, written without TensorFlow or PyTorch by the tensorboardX package."""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import TrainConfig, to_yaml
from shared.config.public import public_config

_FLUSH_SECONDS = 10


def check_tensorboard() -> None:
    """Raises ValueError where the package that writes the events is missing."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ValueError(
            "--report_to tensorboard needs the tensorboardX package, which is not installed. "
            "Run `pip install tensorboardX`, or give --report_to none."
        )


class TensorBoardTracker:
    """Scalars, images with their captions, and the configuration, in `output_dir/logging_dir/tracker_project_name`."""

    def __init__(self, config: TrainConfig):
        self._directory = Path(config.output_dir) / config.logging_dir / config.tracker_project_name
        self._writer = _open_writer(self._directory)
        indented = "".join(
            f"    {line}\n" for line in to_yaml(public_config(config)).splitlines()
        )  # Markdown's code block
        self._writer.add_text("config", indented, 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def images(self, tag: str, images: Sequence[tuple[str, np.ndarray]], step: int) -> None:
        for index, (_, image) in enumerate(images):
            self._writer.add_image(f"{tag}/{index}", image, step, dataformats="HWC")
        # TensorBoard's images have no captions of their own.
        self._writer.add_text(
            f"{tag}/captions", "\n".join(f"{i}. {caption}" for i, (caption, _) in enumerate(images)), step
        )

    def truncate_after(self, step: int) -> None:
        """Tell readers to drop what earlier event files hold past `step`."""
        self._writer.close()
        self._writer = _open_writer(self._directory, purge_step=step + 1)

    def close(self) -> None:
        self._writer.close()


def _open_writer(directory: Path, purge_step: int | None = None) -> Any:
    from tensorboardX import SummaryWriter  # here, because other trackers do without it

    # tensorboardX names files by the second: without a suffix, a writer opened within one overwrites the one before.
    suffix = f".{time.time_ns()}"
    return SummaryWriter(str(directory), purge_step=purge_step, flush_secs=_FLUSH_SECONDS, filename_suffix=suffix)
