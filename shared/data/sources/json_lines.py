"""Folders of images listed by a JSON-lines file. The two layouts that use it differ in the keys alone."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.data.sample import RawSample, captions_of
from shared.data.sources.base import Manifest


@dataclass(frozen=True)
class Keys:
    """Which key of a line holds what. Image names are relative to the folder of the JSON-lines file."""

    image: str
    conditioning_image: str
    caption: str


class JsonLinesSource:
    """Random access to the pairs that a JSON-lines file lists. Images are opened when they are decoded, not before."""

    def __init__(self, kind: str, path: Path, keys: Keys) -> None:
        """Read the whole list.

        Raises:
            ValueError: for a line that is not a JSON object, or a list without lines.
        """
        content = path.read_bytes()
        self._path, self._keys = path, keys
        self._rows = [
            (number, tuple(row.get(key) for key in (keys.image, keys.conditioning_image, keys.caption)))
            for number, row in parse(path, content)
        ]
        if not self._rows:
            raise ValueError(f"{path} lists no samples; expected one JSON object per line")
        self.manifest: Manifest = {
            "kind": kind,
            "location": str(path),
            "samples": len(self._rows),
            "fingerprint": hashlib.sha256(content).hexdigest(),
            "columns": [keys.image, keys.conditioning_image, keys.caption],
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> RawSample:
        number, (image, conditioning_image, caption) = self._rows[index]
        return RawSample(
            image=self._resolve(image),
            conditioning_image=self._resolve(conditioning_image),
            captions=captions_of(caption),
            name=f"{self._path} line {number} ({image})",
        )

    def _resolve(self, name: Any) -> Path | None:
        return self._path.parent / name if isinstance(name, str) and name else None


def parse(path: Path, content: bytes) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank. ValueError for a line that is not an object."""
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path} line {number} is not JSON ({error}); expected one JSON object per line"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is {line[:40]!r}; expected a JSON object")
        rows.append((number, row))
    return rows
