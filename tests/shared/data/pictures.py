"""Twenty small training pairs and every layout they can be stored in."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import webdataset

from shared.config import TrainConfig
from shared.data.batches import BatchLoader, BatchSpec
from shared.data.sources import Source, open_source
from shared.data.sources.circles import draw
from shared.data.tokenization import PromptInputs

LATENT_SHAPE = (4, 4, 4)


def png(seed: int, width: int, height: int) -> bytes:
    """Random pixels, so that no two pictures are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pairs(count: int = 20) -> list[dict[str, Any]]:
    """image, conditioning_image (PNG files of several shapes) and text."""
    sizes = [(32, 32), (48, 40), (33, 47), (64, 35)]
    return [
        {
            "image": png(index, *sizes[index % 4]),
            "conditioning_image": png(1000 + index, *sizes[index % 4]),
            "text": f"caption {index}",
        }
        for index in range(count)
    ]


def write_images(folder: Path, samples: Sequence[dict[str, Any]]) -> None:
    for column in ("image", "conditioning_image"):
        (folder / column).mkdir(parents=True, exist_ok=True)
        for index, sample in enumerate(samples):
            (folder / column / f"{index:04d}.png").write_bytes(sample[column])


def write_image_folder(folder: Path, samples: Sequence[dict[str, Any]]) -> Path:
    write_images(folder, samples)
    rows = [
        {
            "image_file_name": f"image/{index:04d}.png",
            "conditioning_image_file_name": f"conditioning_image/{index:04d}.png",
            "text": sample["text"],
        }
        for index, sample in enumerate(samples)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_prompt_json(folder: Path, samples: Sequence[dict[str, Any]]) -> Path:
    write_images(folder, samples)
    rows = [
        {
            "source": f"conditioning_image/{index:04d}.png",
            "target": f"image/{index:04d}.png",
            "prompt": sample["text"],
        }
        for index, sample in enumerate(samples)
    ]
    (folder / "prompt.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_circles_folder(directory: Path, count: int, size: int, seed: int) -> None:
    """Write the first `count` circles in fill50k's own layout: prompt.json, source/ (outlines), target/ (pictures)."""
    for name in ("source", "target"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    with (directory / "prompt.json").open("w") as lines:
        for index in range(count):
            drawn = draw(index, size, seed)
            line = {"source": f"source/{index}.png", "target": f"target/{index}.png", "prompt": drawn.truth.caption}
            drawn.conditioning_image.save(directory / line["source"])
            drawn.image.save(directory / line["target"])
            lines.write(json.dumps(line) + "\n")


def write_tars(folder: Path, samples: Sequence[dict[str, Any]], per_shard: int = 8) -> Path:
    """WebDataset tars written by webdataset's own writer; the glob of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        with webdataset.TarWriter(str(folder / f"train-{shard:03d}.tar")) as writer:
            for index, sample in enumerate(samples[start : start + per_shard], start=start):
                members = {
                    "image.png": sample["image"],
                    "conditioning_image.png": sample["conditioning_image"],
                    "text.txt": sample["text"],
                }
                writer.write({"__key__": f"{index:04d}"} | members)
    return folder / "train-*.tar"


def config(**values: Any) -> TrainConfig:
    return TrainConfig(**({"resolution": 32, "seed": 7, "max_skipped_samples": 3} | values))


def tokenize(captions: Sequence[str]) -> npt.NDArray[np.int32]:
    """Stands in for CLIP's tokenizer: the characters' codes, padded to 77."""
    return np.array([[*map(ord, caption[:77].ljust(77))] for caption in captions], dtype=np.int32)


def captions_in(batch: dict[str, npt.NDArray[Any]]) -> list[str]:
    """The captions that `tokenize` turned into a batch's input_ids."""
    return ["".join(map(chr, row)).strip() for row in batch["input_ids"].reshape(-1, 77)]


def loader(
    training: TrainConfig,
    spec: BatchSpec | None = None,
    process_index: int = 0,
    process_count: int = 1,
    source: Source | None = None,
) -> BatchLoader:
    return BatchLoader(
        source or open_source(training),
        training,
        PromptInputs(tokenize),
        spec or BatchSpec(8),
        LATENT_SHAPE,
        1000,
        process_index,
        process_count,
    )
