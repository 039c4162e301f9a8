"""TensorBoard event files, written without TensorFlow or PyTorch by means of the tensorboardX package.

Its own SummaryWriter hands events to a thread that ends at the first error of the disk, and whoever logs then waits for
it for ever. So its records are written here, whole or not at all, and an error is an error.
"""

import importlib.util
import os
import re
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import TrainConfig, to_yaml
from shared.config.public import public_config
from shared.outgoing.atomic_files import append_whole
from shared.user_errors import UserError

_FILE_VERSION = "brain.Event:2"
_PREFIX = "events.out.tfevents."
_NAME = re.compile(rf"{re.escape(_PREFIX)}([0-9]{{10}})\.")  # ten digits until the year 2286


def check_tensorboard() -> None:
    """Raises UserError where the package that writes the events is missing."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError(
            "--report_to tensorboard needs the tensorboardX package, which is not installed. "
            "Run `pip install tensorboardX`, or give --report_to none."
        )


class TensorBoardTracker:
    """Scalars, images with their captions, and the configuration, in `output_dir/logging_dir/tracker_project_name`.

    Every method raises OSError where the events cannot be written, and has then written none of its own.
    """

    def __init__(self, config: TrainConfig):
        self._directory = Path(config.output_dir) / config.logging_dir / config.tracker_project_name
        self._file = _EventFile(self._directory)
        indented = "".join(
            f"    {line}\n" for line in to_yaml(public_config(config)).splitlines()
        )  # Markdown's code block
        try:
            self._file.write([_text("config", indented, 0)])
        except OSError:
            self._file.remove()
            raise

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from tensorboardX.summary import scalar

        self._file.write([_summary(scalar(name, value), step) for name, value in metrics.items()])

    def images(self, tag: str, images: Sequence[tuple[str, np.ndarray]], step: int) -> None:
        from tensorboardX.summary import image

        pictures = [
            _summary(image(f"{tag}/{index}", array, dataformats="HWC"), step) for index, (_, array) in enumerate(images)
        ]
        # TensorBoard's images have no captions of their own.
        captions = "\n".join(f"{i}. {caption}" for i, (caption, _) in enumerate(images))
        self._file.write([*pictures, _text(f"{tag}/captions", captions, step)])

    def truncate_after(self, step: int) -> None:
        """Tell readers to drop what earlier event files hold past `step`."""
        new = _EventFile(self._directory, purge_step=step + 1)
        self._file.close()
        self._file = new

    def close(self) -> None:
        self._file.close()


class _EventFile:
    """One file of TensorBoard's records. A write that fails takes back its part: a reader stops at half a record."""

    def __init__(self, directory: Path, purge_step: int | None = None):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / _next_name(directory)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._end = 0
        beginning = [Event(file_version=_FILE_VERSION)]
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            beginning += [
                Event(step=purge_step, file_version=_FILE_VERSION),
                Event(step=purge_step, session_log=start),
            ]
        try:
            self.write(beginning)
        except OSError:
            self.remove()
            raise

    def write(self, events: Sequence[Any]) -> None:
        for event in events:
            event.wall_time = time.time()
        self._end = append_whole(self._descriptor, b"".join(map(_record, events)), self._end)

    def close(self) -> None:
        os.close(self._descriptor)

    def remove(self) -> None:
        """Leave no file behind that holds nothing."""
        os.close(self._descriptor)
        self._path.unlink()


def _next_name(directory: Path) -> str:
    """Behind all that are there, for readers take the files in the order of their names; whatever the clock says.

    Two may be made within a second, and a clock may be set back or be another machine's.
    """
    numbers = [int(found[1]) for path in directory.iterdir() if (found := _NAME.match(path.name))]
    number = max([int(time.time()), *(number + 1 for number in numbers)])
    return f"{_PREFIX}{number:010}.{socket.gethostname()}"


def _record(event: Any) -> bytes:
    """TensorFlow's record: length, checksum of the length, data, checksum of the data."""
    from tensorboardX.record_writer import masked_crc32c

    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def _summary(summary: Any, step: int) -> Any:
    from tensorboardX.proto.event_pb2 import Event  # here, because other trackers do without it

    return Event(summary=summary, step=step)


def _text(tag: str, text: str, step: int) -> Any:
    from tensorboardX.summary import text as text_summary

    # Half of a surrogate pair cannot be written.
    return _summary(text_summary(tag, text.encode("utf-8", "replace").decode("utf-8")), step)
