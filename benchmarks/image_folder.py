"""Data for benchmarks: generated circles as files."""

import json
from pathlib import Path

from shared.data.sources.circles import draw


def write_image_folder(folder: Path, samples: int, resolution: int) -> None:
    """Circles as PNG files with a metadata.jsonl, as diffusers' guide describes an image folder."""
    if (folder / "metadata.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(samples):
        circle = draw(index, resolution, 0)
        names = {"image_file_name": f"{index}.png", "conditioning_image_file_name": f"{index}.cond.png"}
        circle.image.save(folder / names["image_file_name"])
        circle.conditioning_image.save(folder / names["conditioning_image_file_name"])
        lines.append(json.dumps(names | {"text": circle.truth.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
