"""Folders of images that are read without building a datasets cache, in either of two layouts.

Hugging Face's image folder lists its pairs in `metadata.jsonl`. ControlNet's fill50k has `prompt.json` with a line
{"source", "target", "prompt"} per pair, `source` being the condition and `target` the image (Zhang et al., ControlNet
repository, docs/train.md). Beside the list's name they differ in the keys alone.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from shared.config import TrainConfig
from shared.data.sample import NO_CAPTIONS, BadSampleError, RawSample, captions_of
from shared.data.sources.base import Manifest
from shared.data.sources.json_lines import read_rows, text_of
from shared.data.sources.named_files import NamedFiles, allowed_folders
from shared.untrusted import shown
from shared.user_errors import UserError


@dataclass(frozen=True)
class Keys:
    """Which key of a line holds what. Image names are relative to the folder of the JSON-lines file."""

    image: str
    conditioning_images: tuple[str, ...]
    caption: str

    @property
    def in_order(self) -> tuple[str, ...]:
        """All of them: image, conditions, caption."""
        return self.image, *self.conditioning_images, self.caption


_PROMPT_JSON = "prompt.json"
_PROMPT_JSON_KEYS = Keys(image="target", conditioning_images=("source",), caption="prompt")


def open_folder(config: TrainConfig, folder: Path) -> "JsonLinesSource | None":
    """The pairs of a folder in one of the two layouts; None for any other folder, which datasets may know.

    Raises:
        UserError: it is no folder, or empty, cannot be read, or its list is malformed.
    """
    _check_folder(folder)
    files = NamedFiles(str(folder), folder, allowed_folders(config))
    has_prompt_json = os.path.isfile(folder / _PROMPT_JSON)
    if config.streaming:
        if has_prompt_json:
            raise UserError(
                f"--streaming reads folders through datasets, which does not know the prompt.json of "
                f"{shown(folder)!r}; leave --streaming out: this layout is not copied or loaded as a whole in any case"
            )
        return None
    return _open_prompt_json(config, folder, files) if has_prompt_json else _open_image_folder(config, folder, files)


class JsonLinesSource:
    """Random access to the pairs that a JSON-lines file lists. Images are opened when they are decoded, not before."""

    def __init__(self, kind: str, path: Path, keys: Keys, files: NamedFiles) -> None:
        """Read the whole list.

        Args:
            kind: the layout's name in the manifest.
            path: the list.
            keys: of its lines.
            files: what the lines may name.

        Raises:
            UserError: for a list that cannot be read, leads out of the data's folder or has no lines, and for a line
                that is not a JSON object.
        """
        files.check_own(path)
        digest = hashlib.sha256()
        self._path, self._keys, self._files = path, keys, files
        self._rows = [
            (number, tuple(text_of(row.get(key)) for key in keys.in_order)) for number, row in read_rows(path, digest)
        ]
        if not self._rows:
            raise UserError(f"{shown(path)} lists no samples; expected one JSON object per line")
        self.manifest: Manifest = {
            "kind": kind,
            "location": str(path),
            "samples": len(self._rows),
            "fingerprint": digest.hexdigest(),
            "columns": list(keys.in_order),
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> RawSample:
        number, (*pictures, caption) = self._rows[index]
        name = f"{self._path} line {number} ({pictures[0]})"
        try:
            captions = captions_of(caption)
            image, *conditions = (self._files.find(picture, self._path.parent) for picture in pictures)
        except BadSampleError as error:
            return RawSample(None, (), (), name, str(error))
        return RawSample(image, tuple(conditions), captions, name)

    def captions(self, index: int) -> tuple[str, ...]:
        """Without looking for the images."""
        return captions_of(self._rows[index][1][-1])


def _check_folder(folder: Path) -> None:
    if not os.path.isdir(folder):
        raise UserError(f"--train_data_dir is {shown(folder)!r}, which is not a folder; give one that exists")
    try:
        empty = not any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--train_data_dir is {shown(folder)!r}, which cannot be read: {error.strerror}") from error
    if empty:
        raise UserError(f"--train_data_dir is {shown(folder)!r}, which is empty; give a folder with training data")


def _open_prompt_json(config: TrainConfig, folder: Path, files: NamedFiles) -> JsonLinesSource:
    """The pairs of `folder/prompt.json`. UserError when the list is malformed, empty, or has other keys."""
    keys, columns = _PROMPT_JSON_KEYS, config.conditioning_image_column
    if len(columns) > 1:  # a single one names a column of other data: this layout has its own name for it
        keys = replace(keys, conditioning_images=columns)
    source = JsonLinesSource("prompt_json", folder / _PROMPT_JSON, keys, files)
    first = source[0]
    if not first.defect and (first.image is None or None in first.conditioning_images):
        conditions = {name: f"{name}/0.png" for name in keys.conditioning_images}
        example = {**conditions, "target": "target/0.png", "prompt": "a caption"}
        raise UserError(
            f"the first line of {shown(folder / _PROMPT_JSON)} lacks "
            f'{", ".join(shown(json.dumps(name)) for name in conditions)} or "target"; expected lines like '
            f"{shown(json.dumps(example))}"
        )
    return source


def _open_image_folder(config: TrainConfig, folder: Path, files: NamedFiles) -> JsonLinesSource | None:
    """The pairs of `metadata.jsonl`. None without it, or where its first line lacks the columns asked for."""
    candidates = (folder / "metadata.jsonl", folder / "train" / "metadata.jsonl")
    metadata = next((path for path in candidates if os.path.isfile(path)), None)
    if metadata is None:
        return None
    files.check_own(metadata)
    keys = _find_keys(metadata, config)
    return JsonLinesSource("image_folder", metadata, keys, files) if keys else None


def _find_keys(metadata: Path, config: TrainConfig) -> Keys | None:
    """The keys of the first line that hold the columns asked for, or None when one is not there.

    Image columns are found with and without Hugging Face's `_file_name` suffix; the image also as plain `file_name`.
    UserError for a list that cannot be read or is empty.
    """
    first = next(read_rows(metadata), None)
    if first is None:
        raise UserError(f"{shown(metadata)} lists no samples; expected one JSON object per line")
    present = first[1]
    image = _first(present, f"{config.image_column}_file_name", config.image_column, "file_name")
    if config.conditioning_image_column == (config.image_column,):  # conditions are about to be made of the images
        conditions = [image]
    else:
        conditions = [_first(present, f"{column}_file_name", column) for column in config.conditioning_image_column]
    no_captions = config.caption_column == NO_CAPTIONS
    caption = NO_CAPTIONS if no_captions else _first(present, config.caption_column)
    found = [name for name in conditions if name is not None]
    if image is None or caption is None or len(found) < len(conditions):
        return None
    return Keys(image, tuple(found), caption)


def _first(present: dict[str, object], *names: str) -> str | None:
    return next((name for name in names if name in present), None)
