"""The folder of an evaluation, in which the same command goes on where it was.

pictures/000000.png …  as they are drawn: the picture's number says which pair it is of
evaluation.json        how they are drawn, and every metric that is measured already
index.html             the same to look at
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from shared.data.preprocessing import decode
from shared.data.sample import BadSampleError
from shared.evaluate.metrics.base import Measurement
from shared.generate.output_folder import write_picture
from shared.outgoing.atomic_files import write_text_atomically
from shared.outgoing.redaction import masked
from shared.run.folder import entries_of_output_folder, make_output_folder
from shared.untrusted import MIB, read_json, shown
from shared.user_errors import UserError

RECORD_FILE, PAGE_FILE, PICTURES_FOLDER = "evaluation.json", "index.html", "pictures"

_LARGEST_RECORD = 256 * MIB
_NAMED = 5  # of the files that are in the way


@dataclasses.dataclass(frozen=True)
class KeptMeasurement:
    """A metric's figures, and the settings that they depend on beside the pictures."""

    settings: dict[str, str]
    found: Measurement


@dataclasses.dataclass(frozen=True)
class _Record:
    """What is read of an earlier record."""

    evaluated_by: Annotated[str, Meta(max_length=100)]
    drawn_with: dict[str, Any]
    metrics: dict[str, KeptMeasurement]


class OutputFolder:
    """See above."""

    def __init__(self, path: Path) -> None:
        """Makes it where it is missing.

        Raises:
            UserError: it cannot be made or written to, or holds files of anything but an evaluation.
        """
        self.path, self._pictures = path, path / PICTURES_FOLDER
        make_output_folder(self._pictures)
        found = entries_of_output_folder(path)
        self._earlier = self._read() if RECORD_FILE in found else None
        own = {PICTURES_FOLDER} if self._earlier is None else {PICTURES_FOLDER, RECORD_FILE, PAGE_FILE}
        others = sorted(found - own)
        if self._earlier is None and any(self._pictures.iterdir()):
            others.append(PICTURES_FOLDER)
        if others:
            more = " …" if len(others) > _NAMED else ""
            raise UserError(
                f"--output_dir {shown(path)} holds files that are not of an evaluation "
                f"({shown(', '.join(others[:_NAMED]))}{more}): expected a new or empty folder, or that of an earlier "
                "evaluation. Choose another folder."
            )

    def begin(self, drawn_with: Mapping[str, Any]) -> dict[str, KeptMeasurement]:
        """The metrics that were measured already, on pictures that were drawn in the same way.

        Args:
            drawn_with: what decides the pictures, by name, as JSON has it.

        Raises:
            UserError: an earlier evaluation drew them otherwise.
        """
        if self._earlier is None:
            return {}
        earlier = self._earlier.drawn_with
        differing = [name for name in drawn_with.keys() | earlier.keys() if drawn_with.get(name) != earlier.get(name)]
        if differing:
            told = "; ".join(
                f"{shown(name)} was {_told(earlier.get(name))} and is {_told(drawn_with.get(name))}"
                for name in sorted(differing)
            )
            raise UserError(
                f"The pictures in --output_dir {shown(self.path)} were drawn otherwise: {told}. Give what was given "
                "then, or another folder."
            )
        return self._earlier.metrics

    def write(self, record: Mapping[str, Any], metrics: Mapping[str, KeptMeasurement]) -> None:
        """`evaluation.json`. UserError where it cannot be written."""
        kept = {name: dataclasses.asdict(one) for name, one in metrics.items()}
        content = {"evaluated_by": "controlnet-trainer", **record, "metrics": kept}
        self._write_text(RECORD_FILE, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def write_page(self, html: str) -> None:
        """`index.html`. UserError where it cannot be written."""
        self._write_text(PAGE_FILE, html)

    def is_drawn(self, number: int) -> bool:
        """Whether a picture is there. Each is written whole or not at all."""
        return self._picture(number).is_file()

    def write_picture(self, number: int, image_HWC: npt.NDArray[np.uint8], caption: str) -> None:
        """Raises UserError where it cannot be written."""
        write_picture(self._picture(number), image_HWC, {"prompt": masked(caption)})

    def read_picture(self, number: int, height: int, width: int) -> npt.NDArray[np.uint8]:
        """uint8 [H,W,3]. UserError where it is damaged or of another size."""
        path = self._picture(number)
        try:
            picture = decode(path, 3)
        except BadSampleError as error:
            raise UserError(
                f"{shown(path)} cannot be read: {error}. Delete it: the same command draws it again."
            ) from error
        if picture.size != (width, height):
            raise UserError(
                f"{shown(path)} has {picture.width}x{picture.height} pixels; expected {width}x{height}. Delete it: the "
                "same command draws it again."
            )
        return np.asarray(picture)

    def _picture(self, number: int) -> Path:
        return self._pictures / f"{number:06}.png"

    def _read(self) -> _Record:
        fix = "Delete the folder, or choose another --output_dir."
        return read_json(self.path / RECORD_FILE, _Record, fix=fix, limit=_LARGEST_RECORD)

    def _write_text(self, name: str, text: str) -> None:
        try:
            write_text_atomically(self.path / name, text)
        except OSError as error:
            raise UserError(
                f"--output_dir {shown(self.path)} cannot be written to ({error.strerror or shown(error)}). If the disk "
                "is full, free some space; or choose another folder."
            ) from error


def _told(value: Any) -> str:
    return shown(json.dumps(value), 200)
