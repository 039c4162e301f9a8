"""Seconds per picture of diffusers' ControlNet pipeline and of the commands here, by turns, on this machine's device.

    python3 -m benchmarks.drawing_speed --folder FOLDER [--model sd15] [--resolution 512] [--steps 4] [--json FILE]

FOLDER receives a model with random weights and its ControlNet (5.7 GB for sd15), whose pictures are noise. Every side
is a process of its own, which loads its models and draws once before it is timed; all stay in memory.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from flax_trainer.random_model import ARCHITECTURES, write_random_model
from shared.config import Backend

PROMPT = "red circle with blue background"
_PACKAGES = ("torch", "diffusers", "jax", "flax")
Draw = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", choices=["tiny", "sd15"], default="sd15")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["diffusers", "torch", "flax"])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4, help="of UniPC")
    parser.add_argument("--pictures", type=int, default=1, help="drawn at once")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    write_models(arguments.folder, arguments.model)
    seconds = measure(arguments)
    print(report(seconds))
    if arguments.json:
        written = {
            "machine": f"{os.cpu_count()} processors, {platform.machine()}",
            "versions": {package: metadata.version(package) for package in _PACKAGES},
            "flags": {name: str(value) for name, value in vars(arguments).items()},
            "seconds_per_picture": seconds,
        }
        arguments.json.write_text(json.dumps(written, indent=2), encoding="utf-8")


def write_models(folder: Path, model: str) -> None:
    """The base model, a ControlNet, and a condition; what is there already is used again."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    base, controlnet = _base(folder, model), _controlnet(folder, model)
    if not base.exists():
        write_random_model(ARCHITECTURES[model], base)
    if not controlnet.exists():
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
        ControlNetModel.from_unet(unet).save_pretrained(controlnet)
    rows, columns = np.mgrid[:512, :512]
    ring = np.abs(np.hypot(rows - 256, columns - 256) - 150) < 3
    PIL.Image.fromarray(np.where(ring, 255, 0).astype(np.uint8)).convert("RGB").save(folder / "condition.png")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds per picture of every side, the median of all rounds, in which they follow each other."""
    spawning = multiprocessing.get_context("spawn")
    sides: dict[str, Connection] = {}
    for name in arguments.sides:
        sides[name], theirs = spawning.Pipe()
        spawning.Process(target=_side, args=(name, arguments, theirs), daemon=True).start()
    for connection in sides.values():
        connection.recv()  # that it has drawn once
    timed: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, connection in sides.items():
            connection.send("draw")
            timed[name].append(connection.recv() / arguments.pictures)
    for connection in sides.values():
        connection.send("stop")
    return {name: statistics.median(seconds) for name, seconds in timed.items()}


def report(seconds: dict[str, float]) -> str:
    """A table; ratios are of diffusers' time, so more is faster."""
    first = seconds.get("diffusers")
    lines = ["| | seconds per picture | times as fast as diffusers |", "|---|---:|---:|"]
    for name, value in seconds.items():
        lines.append(f"| {name} | {value:.2f} | {'' if first is None else f'{first / value:.2f}'} |")
    return "\n".join(lines)


def _side(name: str, arguments: argparse.Namespace, connection: Connection) -> None:
    draw = SIDES[name](arguments)
    draw()
    connection.send("ready")
    while connection.recv() == "draw":
        started = time.perf_counter()
        draw()
        connection.send(time.perf_counter() - started)


def _diffusers(arguments: argparse.Namespace, *, compiled: bool = False) -> Draw:
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UniPCMultistepScheduler

    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[arguments.mixed_precision]
    controlnet = ControlNetModel.from_pretrained(_controlnet(arguments.folder, arguments.model), dtype=dtype)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        _base(arguments.folder, arguments.model), controlnet=controlnet, safety_checker=None, dtype=dtype
    )
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    if compiled:
        pipeline.unet, pipeline.controlnet = torch.compile(pipeline.unet), torch.compile(pipeline.controlnet)
    condition = PIL.Image.open(arguments.folder / "condition.png").resize((arguments.resolution, arguments.resolution))
    return lambda: pipeline(
        [PROMPT] * arguments.pictures,
        image=[condition] * arguments.pictures,
        num_inference_steps=arguments.steps,
        height=arguments.resolution,
        width=arguments.resolution,
        output_type="np",
    )


def _diffusers_compiled(arguments: argparse.Namespace) -> Draw:
    return _diffusers(arguments, compiled=True)


def _torch(arguments: argparse.Namespace) -> Draw:
    from torch_trainer.evaluation.artist import make_artist

    return _ours(arguments, "torch", make_artist)


def _flax(arguments: argparse.Namespace) -> Draw:
    from flax_trainer.evaluation.artist import make_artist

    return _ours(arguments, "flax", make_artist)


def _ours(arguments: argparse.Namespace, backend: Backend, make_artist: Any) -> Draw:
    """What `python3 -m …_trainer.generate` draws with."""
    from shared.generate.command import read_command
    from shared.generate.preparation import prepare_job

    folder = arguments.folder
    words = [
        *("--pretrained_model_name_or_path", _base(folder, arguments.model)),
        *("--controlnet_model_name_or_path", _controlnet(folder, arguments.model)),
        *("--conditioning_image", folder / "condition.png", "--prompt", PROMPT),
        *("--num_images_per_prompt", arguments.pictures, "--batch_size", arguments.pictures),
        *("--resolution", arguments.resolution, "--num_inference_steps", arguments.steps),
        *("--mixed_precision", arguments.mixed_precision, "--output_dir", folder / f"pictures-{backend}"),
    ]
    job = prepare_job(read_command([*map(str, words)]), backend)
    artist = make_artist(job)
    numbers = [request.number for request in job.requests]
    conditions_RHWC = job.conditions_GHWN[[request.condition for request in job.requests]]
    return lambda: artist.draw([PROMPT] * len(numbers), conditions_RHWC, numbers)


def _base(folder: Path, model: str) -> Path:
    return folder / model


def _controlnet(folder: Path, model: str) -> Path:
    return folder / f"{model}-controlnet"


SIDES: dict[str, Callable[[argparse.Namespace], Draw]] = {
    "diffusers": _diffusers,
    "diffusers_compiled": _diffusers_compiled,
    "torch": _torch,
    "flax": _flax,
}


if __name__ == "__main__":
    main()
