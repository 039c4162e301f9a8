"""Training samples with two conditions, and every layout they can be stored in."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import webdataset

from tests.shared.data.pictures import png

COLUMNS = ("depth", "canny")
CHANNELS = (1, 3)


def grey_png(seed: int, width: int, height: int) -> bytes:
    """Of 16 bits, as depth maps are."""
    pixels = np.random.default_rng(seed).integers(0, 2**16, (height, width), dtype=np.uint16)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def samples(count: int = 20) -> list[dict[str, Any]]:
    """image, depth (half as large), canny and text."""
    sizes = [(64, 64), (48, 40), (66, 94), (64, 36)]
    return [
        {
            "image": png(index, width, height),
            "depth": grey_png(2000 + index, width // 2, height // 2),
            "canny": png(1000 + index, width, height),
            "text": f"caption {index}",
        }
        for index, (width, height) in ((index, sizes[index % 4]) for index in range(count))
    ]


def write_files(folder: Path, written: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Files in folders of the columns' names; returns those names by column."""
    names = []
    for index, sample in enumerate(written):
        named = {column: f"{column}/{index:04d}.png" for column in ("image", *COLUMNS) if column in sample}
        for column, name in named.items():
            (folder / column).mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(sample[column])
        names.append(named)
    return names


def write_image_folder(folder: Path, written: Sequence[dict[str, Any]]) -> Path:
    rows = [
        {f"{column}_file_name": name for column, name in named.items()} | {"text": sample["text"]}
        for named, sample in zip(write_files(folder, written), written, strict=True)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_prompt_json(folder: Path, written: Sequence[dict[str, Any]]) -> Path:
    rows = [
        {"target": named.pop("image"), "prompt": sample["text"], **named}
        for named, sample in zip(write_files(folder, written), written, strict=True)
    ]
    (folder / "prompt.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_tars(folder: Path, written: Sequence[dict[str, Any]], per_shard: int = 8) -> Path:
    """The glob of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(written), per_shard)):
        with webdataset.TarWriter(str(folder / f"train-{shard:03d}.tar")) as writer:
            for index, sample in enumerate(written[start : start + per_shard], start=start):
                members = {f"{column}.png": sample[column] for column in ("image", *COLUMNS) if column in sample}
                writer.write({"__key__": f"{index:04d}", "txt": sample["text"]} | members)
    return folder / "train-*.tar"


def write_dataset(folder: Path, written: Sequence[dict[str, Any]]) -> Path:
    pictures = {column: datasets.Image() for column in ("image", *COLUMNS)}
    features = datasets.Features({"text": datasets.Value("string"), **pictures})
    datasets.Dataset.from_list(list(written), features=features).save_to_disk(str(folder))
    return folder
