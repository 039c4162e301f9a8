"""Data for benchmarks: pairs like photographs and their edges as files, and any image folder as a tar."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import webdataset

from shared.generate.conditions import ConditionKind, as_conditions

_WIDTH, _HEIGHT = 1024, 768


def write_photo_folder(folder: Path, samples: int, prepared: int | None = None) -> None:
    """JPEG files, and grey PNG files of their edges, with a metadata.jsonl.

    `prepared` is the side of squares to which both are resized and cropped beforehand.
    """
    if (folder / "metadata.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(samples):
        image = photo(index)
        edges = edges_of(image)
        if prepared is not None:
            image, edges = (
                PIL.Image.fromarray(as_conditions([picture], [kind], prepared, prepared).squeeze())
                for picture, kind in ((image, ConditionKind(3, "bilinear")), (edges, ConditionKind(1, "bilinear")))
            )
        names = {"image_file_name": f"{index}.jpg", "conditioning_image_file_name": f"{index}.cond.png"}
        image.save(folder / names["image_file_name"], quality=90 if prepared is None else 95)
        edges.save(folder / names["conditioning_image_file_name"])
        lines.append(json.dumps(names | {"text": f"a photograph, number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def photo(seed: int) -> PIL.Image.Image:
    """Noise whose amplitude falls with the frequency, most of its contrast in brightness, as in photographs."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(_HEIGHT)[:, None], np.fft.rfftfreq(_WIDTH)[None])
    amplitude = 1 / np.maximum(frequency, 1 / _WIDTH) ** 1.2
    waves = [amplitude * (draw.standard_normal((2, *amplitude.shape)).T @ np.array([1, 1j])).T for _ in range(3)]
    planes = [np.fft.irfft2(wave, s=(_HEIGHT, _WIDTH)) for wave in waves]
    brightness, red, blue = (plane / plane.std() for plane in planes)
    pixels_HWC = 128 + 50 * brightness[:, :, None] + 15 * np.stack([red, np.zeros_like(red), blue], axis=-1)
    return PIL.Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8))


def edges_of(image: PIL.Image.Image) -> PIL.Image.Image:
    """White lines on black, of one channel."""
    smooth = image.convert("L").filter(PIL.ImageFilter.GaussianBlur(3))
    return smooth.filter(PIL.ImageFilter.FIND_EDGES).point([0] * 16 + [255] * 240)


def write_tar(folder: Path) -> Path:
    """An image folder's samples as one WebDataset tar, beside its metadata.jsonl."""
    tar = folder / "samples.tar"
    if tar.exists():
        return tar
    with webdataset.TarWriter(str(tar)) as writer:
        for index, line in enumerate((folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            image, condition = (folder / row[f"{name}_file_name"] for name in ("image", "conditioning_image"))
            writer.write(
                {
                    "__key__": f"{index:06d}",
                    f"image{image.suffix}": image.read_bytes(),
                    f"conditioning_image{condition.suffix}": condition.read_bytes(),
                    "text.txt": row["text"],
                }
            )
    return tar
