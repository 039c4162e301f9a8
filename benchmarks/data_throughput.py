"""Training pairs per second: our loader, and that of diffusers' guide.

    python3 -m benchmarks.data_throughput --folder FOLDER [--threads 2] [--seconds 10] [--json FILE]

Both sides by turns, 8 pairs per batch, on

- photos: JPEG files of 1024x768, and grey PNG files of their edges;
- circles: the kind of fill50k, two RGB PNG files of --resolution;
- prepared: the photos, resized and cropped to --resolution beforehand.

Ours reads them from a folder and from a tar, with as many threads as the reference (`benchmarks.guide_loader`) has
processes. Then it says where a processor's time for one pair goes, its parts one after another in one thread.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPTokenizer

from benchmarks.guide_loader import guide_loader
from benchmarks.image_folder import write_image_folder
from benchmarks.photo_folder import write_photo_folder, write_tar
from shared.config import TrainConfig
from shared.config.demo import BASE_MODEL
from shared.data.batches import BatchLoader, BatchSpec
from shared.data.preprocessing import decode_picture
from shared.data.preprocessing import rendered as render_view
from shared.data.sources import open_source
from shared.data.sources.base import RandomAccessSource
from shared.data.tokenization import PromptInputs, tokenizer_function
from shared.data.views import view_of
from shared.randomness import Purpose, generator

CASES = ("photos", "circles", "prepared")
_BATCH = 8
_WARM_UP = 2  # batches of every measurement that do not count
_REFERENCE = "reference"
_DECODED = ("decode the image", "decode the condition")
_RENDERED = ("resize and crop the image", "resize and crop the condition")


@dataclass(frozen=True)
class Figures:
    """Of one case.

    Attributes:
        rates: pairs per second of every side, the median of all rounds.
        parts: a processor's milliseconds for a pair, ours.
        reference_ms: the same of the whole reference.
    """

    rates: dict[str, float]
    parts: dict[str, float]
    reference_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the data; what is there already is used again")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--threads", type=int, default=2, help="threads here, DataLoader processes in the reference")
    parser.add_argument("--samples", type=int, default=64, help="of each case")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = {case: measure(write_data(case, arguments), arguments) for case in arguments.cases}
    print(report(figures))
    if arguments.json:
        written = {case: asdict(figure) for case, figure in figures.items()}
        arguments.json.write_text(json.dumps({"processors": os.cpu_count(), "cases": written}), encoding="utf-8")


def write_data(case: str, arguments: argparse.Namespace) -> Path:
    """A case's folder, with its tar inside."""
    folder: Path = arguments.folder / f"{case}-{arguments.samples}-{arguments.resolution}"
    if case == "circles":
        write_image_folder(folder, arguments.samples, arguments.resolution)
    else:
        write_photo_folder(folder, arguments.samples, arguments.resolution if case == "prepared" else None)
    write_tar(folder)
    return folder


def measure(folder: Path, arguments: argparse.Namespace) -> Figures:
    """Every side in every round, one after the other."""
    tokenizer = CLIPTokenizer.from_pretrained(BASE_MODEL, subfolder="tokenizer")
    common = TrainConfig(resolution=arguments.resolution, dataloader_num_workers=arguments.threads, seed=0)
    configs = {
        "ours, folder": replace(common, train_data_dir=str(folder)),
        "ours, tar": replace(common, train_shards=(str(write_tar(folder)),)),
    }
    sides: dict[str, Callable[[], float]] = {
        side: partial(our_rate, config, tokenizer, arguments.seconds) for side, config in configs.items()
    }
    sides[_REFERENCE] = partial(reference_rate, folder, tokenizer, arguments)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(arguments.rounds):
        for side, side_rate in sides.items():
            rates[side].append(side_rate())
    parts = time_of_parts(configs["ours, tar"], tokenizer, arguments.samples)
    medians = {side: statistics.median(values) for side, values in rates.items()}
    return Figures(medians, parts, time_of_reference(folder, tokenizer, arguments))


def our_rate(config: TrainConfig, tokenizer: CLIPTokenizer, seconds: float) -> float:
    loader = _our_loader(config, tokenizer)
    try:
        return rate((batch for _, batch in loader), seconds)
    finally:
        loader.close()


def reference_rate(folder: Path, tokenizer: CLIPTokenizer, arguments: argparse.Namespace) -> float:
    return rate(guide_loader(folder, tokenizer, arguments.resolution, _BATCH, arguments.threads), arguments.seconds)


def rate(batches: Iterable[Any], seconds: float) -> float:
    """Pairs per second, counted from when the pipeline is full."""
    started, counted = 0.0, 0
    for number, _ in enumerate(batches, start=1):
        now = time.perf_counter()
        if number == _WARM_UP:
            started = now
        elif number > _WARM_UP:
            counted += _BATCH
            if now - started >= seconds:
                break
    return counted / (now - started)


def time_of_parts(config: TrainConfig, tokenizer: CLIPTokenizer, samples: int) -> dict[str, float]:
    """A processor's milliseconds for a pair: each part's median over the samples. The rest is a batch's less those."""
    source, loader = open_source(config), _our_loader(config, tokenizer)
    assert isinstance(source, RandomAccessSource)
    latent_shape = (config.resolution // 8, config.resolution // 8, 4)
    out = np.empty((config.resolution, config.resolution, 3), np.uint8)
    taken: dict[str, list[float]] = {part: [] for part in ("read", *_DECODED, *_RENDERED, "noise", "batch")}

    def timed(part: str, function: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = function()
        taken[part].append(1000 * (time.process_time() - started))
        return result

    for index in range(samples):
        sample = timed("read", partial(source.__getitem__, index))
        for decoded, rendered, image in zip(
            _DECODED, _RENDERED, (sample.image, *sample.conditioning_images), strict=True
        ):
            picture = timed(decoded, partial(decode_picture, image))
            view = view_of(picture.size, (config.resolution, config.resolution))
            timed(rendered, partial(render_view, picture, view, config.image_interpolation_mode, out=out))
        timed("noise", partial(_draw_noise, index, latent_shape))
    for step in range(max(1, samples // _BATCH)):
        timed("batch", partial(loader.batch, step))
    loader.close()
    median = {part: statistics.median(values) for part, values in taken.items()}
    batch = median.pop("batch")
    return median | {"rest": batch / _BATCH - sum(median.values())}


def time_of_reference(folder: Path, tokenizer: CLIPTokenizer, arguments: argparse.Namespace) -> float:
    """Processors' milliseconds for a pair, from the first batch to the end of the processes that make them."""
    loader = guide_loader(folder, tokenizer, arguments.resolution, _BATCH, arguments.threads, repeated=4)
    started = _processor_time()
    for _ in loader:
        pass
    return 1000 * (_processor_time() - started) / len(loader.dataset)


def _processor_time() -> float:
    """Seconds of this process, and of those it started that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def report(figures: dict[str, Figures]) -> str:
    """Two tables in Markdown."""
    sides = next(iter(figures.values())).rates
    lines = ["| pairs/s | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for case, figure in figures.items():
        reference = figure.rates[_REFERENCE]
        cells = [
            f"{value:.1f}" + ("" if side == _REFERENCE else f" ({value / reference:.2f}×)")
            for side, value in figure.rates.items()
        ]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    if {"photos", "prepared"} <= figures.keys():
        ratio = figures["prepared"].rates["ours, tar"] / figures["photos"].rates[_REFERENCE]
        lines.append(f"\nPrepared, from a tar: {ratio:.1f}× of the reference on the photos that they were made of.")
    lines += ["", "| processor ms of one pair | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for part in next(iter(figures.values())).parts:
        lines.append(f"| {part} | " + " | ".join(f"{figure.parts[part]:.2f}" for figure in figures.values()) + " |")
    lines.append("| sum | " + " | ".join(f"{sum(figure.parts.values()):.2f}" for figure in figures.values()) + " |")
    lines.append("| the reference | " + " | ".join(f"{figure.reference_ms:.2f}" for figure in figures.values()) + " |")
    return "\n".join(lines)


def _our_loader(config: TrainConfig, tokenizer: CLIPTokenizer) -> BatchLoader:
    latent_shape = (config.resolution // 8, config.resolution // 8, 4)
    inputs = PromptInputs(tokenizer_function(tokenizer))
    return BatchLoader(open_source(config), config, inputs, BatchSpec(_BATCH), latent_shape, 1000)


def _draw_noise(position: int, shape: tuple[int, int, int]) -> None:
    out = np.empty(shape, np.float32)
    for purpose in (Purpose.VAE_NOISE, Purpose.NOISE):
        generator(0, purpose, position).standard_normal(dtype=np.float32, out=out)


if __name__ == "__main__":
    main()
