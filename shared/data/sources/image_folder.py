"""A folder of images with Hugging Face's `metadata.jsonl`, read without building a datasets cache."""

import os
from pathlib import Path

from shared.data.sources.json_lines import JsonLinesSource, Keys, read_rows
from shared.data.sources.named_files import NamedFiles
from shared.untrusted import shown
from shared.user_errors import UserError


def find_metadata(folder: Path) -> Path | None:
    """`metadata.jsonl` in the folder or in its `train` folder, or None."""
    candidates = (folder / "metadata.jsonl", folder / "train" / "metadata.jsonl")
    return next((path for path in candidates if os.path.isfile(path)), None)


def find_keys(metadata: Path, image_column: str, conditioning_image_column: str, caption_column: str) -> Keys | None:
    """The keys of the first line that hold the three columns, or None when one is not there.

    Image columns are found with and without Hugging Face's `_file_name` suffix; the image also as plain `file_name`.
    UserError for a list that cannot be read or is empty.
    """
    first = next(read_rows(metadata), None)
    if first is None:
        raise UserError(f"{shown(metadata)} lists no samples; expected one JSON object per line")
    present = first[1]
    image = _first(present, f"{image_column}_file_name", image_column, "file_name")
    conditioning_image = _first(present, f"{conditioning_image_column}_file_name", conditioning_image_column)
    caption = _first(present, caption_column)
    if image is None or conditioning_image is None or caption is None:
        return None
    return Keys(image, conditioning_image, caption)


def open_image_folder(metadata: Path, keys: Keys, files: NamedFiles) -> JsonLinesSource:
    """The pairs that `metadata` lists under `keys`. UserError for a malformed list."""
    return JsonLinesSource("image_folder", metadata, keys, files)


def _first(present: dict[str, object], *names: str) -> str | None:
    return next((name for name in names if name in present), None)
