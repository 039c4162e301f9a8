"""The data loader of diffusers' guide for training a ControlNet: `datasets` with transforms behind a DataLoader.

Reference: diffusers 0.39, `examples/controlnet/train_controlnet.py`, `make_train_dataset`, `prepare_train_dataset` and
`collate_fn`: Resize, CenterCrop, ToTensor and Normalize of torchvision. torchvision is not needed: its transforms of a
PIL image are PIL's resize and crop, then the operations of PyTorch that are written out here.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Image
from transformers import CLIPTokenizer

from shared.data.views import crop_corner, resized_size


def guide_loader(
    folder: Path, tokenizer: CLIPTokenizer, resolution: int, batch_size: int, workers: int, repeated: int = 2000
) -> Any:
    """Batches of an image folder in random order, float32 [B,C,H,W], made by `workers` processes.

    Its one epoch has each sample that many times, so that a benchmark does not wait for processes to start.
    """

    def transform(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        tokens = tokenizer(
            examples["text"],
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        images, conditions = (
            [_to_tensor(image.convert("RGB"), resolution) for image in examples[column]]
            for column in ("image", "conditioning_image")
        )
        return {
            "pixel_values": [_normalize(image) for image in images],
            "conditioning_pixel_values": conditions,
            "input_ids": list(tokens.input_ids),
        }

    return torch.utils.data.DataLoader(
        dataset(folder, repeated).with_transform(transform),
        shuffle=True,
        collate_fn=_collate,
        batch_size=batch_size,
        num_workers=workers,
    )


def dataset(folder: Path, repeated: int) -> Dataset:
    """An image folder's rows, that many times, their pictures decoded when they are read."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    rows *= repeated
    columns = {
        "image": [str(folder / row["image_file_name"]) for row in rows],
        "conditioning_image": [str(folder / row["conditioning_image_file_name"]) for row in rows],
        "text": [row["text"] for row in rows],
    }
    return Dataset.from_dict(columns).cast_column("image", Image()).cast_column("conditioning_image", Image())


def _to_tensor(image: PIL.Image.Image, resolution: int) -> torch.Tensor:
    """Resize, CenterCrop, ToTensor."""
    size = resized_size(*image.size, resolution, resolution)
    resized = image if size == image.size else image.resize(size, PIL.Image.Resampling.BILINEAR)
    left, top = crop_corner(*size, resolution, resolution)
    cropped = resized.crop((left, top, left + resolution, top + resolution))
    pixels_HWC = torch.from_numpy(np.array(cropped, np.uint8, copy=True))
    return pixels_HWC.permute((2, 0, 1)).contiguous().to(torch.float32).div(255)


def _normalize(pixels_CHW: torch.Tensor) -> torch.Tensor:
    half = torch.as_tensor([0.5]).view(-1, 1, 1)
    return pixels_CHW.clone().sub_(half).div_(half)


def _collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    for name in ("pixel_values", "conditioning_pixel_values"):
        batch[name] = batch[name].to(memory_format=torch.contiguous_format).float()
    return batch
