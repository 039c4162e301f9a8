"""The folder of a generation: pictures with their settings in them, a contact sheet, `generation.json`.

generation.json is there from the first picture on: it says which files are this command's, so that a later generation
in the same folder may replace them, and nothing else.
"""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image, PngImagePlugin

from shared.evaluation.image_grid import GridRow, condition_pictures, enlarge, save_grid
from shared.outgoing.atomic_files import write_atomically, write_text_atomically
from shared.run.folder import entries_of_output_folder
from shared.untrusted import MIB, read_json, shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

RECORD_FILE = "generation.json"
CONTACT_SHEET = "contact_sheet.png"

_PICTURE = re.compile(r"[0-9]{3,7}\.png")
_LARGEST_RECORD = 64 * MIB
_NAMED = 5  # of the files that are in the way
_THUMBNAIL = 256, 192  # pixels: the longer side of a picture on the sheet at most, the shorter one of a small picture
_MOST_ON_SHEET = 100, 8  # rows, and pictures in a row


class _Record(TypedDict):
    """What is read of an earlier generation's record."""

    pictures: list[dict[str, Any]]
    generated_by: str


def check_output_folder(folder: Path) -> None:
    """Before anything is loaded: whether the pictures may be written there. It is made where missing.

    Raises:
        UserError: it cannot be made or written to, or holds files of anything but an earlier generation.
    """
    others = sorted(entries_of_output_folder(folder) - _files_of_earlier(folder))
    if others:
        more = " …" if len(others) > _NAMED else ""
        raise UserError(
            f"--output_dir {shown(folder)} holds files that are not of an earlier generation "
            f"({shown(', '.join(others[:_NAMED]))}{more}): expected a new or empty folder, or one with nothing but "
            f"what the {RECORD_FILE} in it lists. Choose another folder."
        )


def begin_output(folder: Path, record: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> None:
    """Take an earlier generation's pictures away, and say what is to come.

    Raises:
        UserError: files cannot be deleted or written.
    """
    earlier = _files_of_earlier(folder)
    if earlier:
        logger.info("The pictures of the earlier generation in %s are replaced", shown(folder))
    try:
        for name in earlier - {RECORD_FILE}:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(folder, error) from error
    write_record(folder, record, pictures, finished=False)


def write_record(
    folder: Path, record: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]], *, finished: bool
) -> None:
    """`generation.json`. UserError where it cannot be written."""
    content = {"generated_by": "controlnet-trainer", "finished": finished, **record, "pictures": list(pictures)}
    try:
        write_text_atomically(folder / RECORD_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise _not_written(folder, error) from error


def write_picture(path: Path, image_HWC: np.ndarray, texts: Mapping[str, str]) -> None:
    """A PNG of a uint8 image, with texts in its metadata.

    Raises:
        UserError: it cannot be written.
    """
    metadata = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        metadata.add_itxt(name, text)
    try:
        write_atomically(
            path, lambda temporary: Image.fromarray(image_HWC).save(temporary, format="PNG", pnginfo=metadata)
        )
    except OSError as error:
        raise _not_written(path.parent, error) from error


class ContactSheet:
    """Every condition beside its pictures, small; of very many, the first."""

    def __init__(self, pictures_per_row: int, channels: Sequence[int]):
        """`channels`: of each condition of a picture."""
        self._per_row, self._channels = pictures_per_row, channels
        self._rows: list[tuple[str, list[tuple[str, np.ndarray]]]] = []

    def add(self, number: int, heading: str, caption: str, conditions_HWN: np.ndarray, image_HWC: np.ndarray) -> None:
        """Pictures come in the order of their numbers; all of a row have its heading and conditions (RGB or grey)."""
        row, place = divmod(number, self._per_row)
        most_rows, most_pictures = _MOST_ON_SHEET
        if row >= most_rows or place >= most_pictures:
            return
        if place == 0:
            conditions = condition_pictures(conditions_HWN, self._channels)
            self._rows.append((heading, [(words, _thumbnail(picture)) for words, picture in conditions]))
        self._rows[-1][1].append((caption, _thumbnail(image_HWC)))

    def write(self, folder: Path) -> None:
        """Raises UserError where it cannot be written."""
        try:
            save_grid(folder / CONTACT_SHEET, [GridRow(heading, images) for heading, images in self._rows])
        except OSError as error:
            raise _not_written(folder, error) from error


def _thumbnail(image_HWC: np.ndarray) -> np.ndarray:
    largest, smallest = _THUMBNAIL
    if max(image_HWC.shape[:2]) <= largest:
        return enlarge(image_HWC, smallest)
    picture = Image.fromarray(image_HWC)
    picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _files_of_earlier(folder: Path) -> set[str]:
    """Names of what an earlier generation left in a folder; a record that is none counts for nothing."""
    if not os.path.lexists(folder / RECORD_FILE):
        return set()
    fix = "Delete it, or choose another --output_dir."
    record: _Record = read_json(folder / RECORD_FILE, _Record, fix=fix, limit=_LARGEST_RECORD)
    listed = {str(picture.get("file")) for picture in record["pictures"]}
    return {RECORD_FILE, CONTACT_SHEET} | set(filter(_PICTURE.fullmatch, listed))


def _not_written(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"--output_dir {shown(folder)} cannot be written to ({error.strerror or shown(error)}). If the disk is full, "
        "free some space; or choose another folder."
    )
