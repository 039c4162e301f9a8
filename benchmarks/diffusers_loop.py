"""A training loop written directly on diffusers' models: what diffusers' train_controlnet.py does, step by step.

    python3 -m benchmarks.diffusers_loop --model MODEL --data FOLDER [--steps 20] [--profile FILE]

A `datasets` image folder through a DataLoader, noise and timesteps drawn on the device, the ControlNet in float32 under
autocast, the frozen models in the compute dtype, AdamW, clipping, and the loss fetched at every step. The last line of
its output is JSON.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, Image
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

WARM_UP = 3  # steps that do not count for the speed
PROFILED = 3  # the last steps, which do not count either


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder of benchmarks.image_folder")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--workers", type=int, default=0, help="processes of the DataLoader")
    parser.add_argument("--steps", type=int, help="an epoch, if not given")
    parser.add_argument("--profile", type=Path, help=f"write a trace of the last {PROFILED} steps there")
    arguments = parser.parse_args()
    print(json.dumps(train(arguments, started)))


@dataclass(frozen=True)
class _Models:
    vae: Any
    unet: Any
    text_encoder: Any
    controlnet: Any
    scheduler: Any
    dtype: torch.dtype


def train(arguments: argparse.Namespace, started: float) -> dict[str, Any]:
    """`seconds` are the epoch's, from the first batch asked for to the last optimizer step, without loading."""
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision, cpu=not torch.accelerator.is_available())
    models = _load(arguments, accelerator.device)
    optimizer: Any = torch.optim.AdamW(models.controlnet.parameters(), lr=5e-6)
    controlnet, optimizer, loader = accelerator.prepare(models.controlnet, optimizer, _loader(arguments))
    models = _Models(**(models.__dict__ | {"controlnet": controlnet.train()}))

    finished = [time.perf_counter()]
    steps = arguments.steps or len(loader)
    with ExitStack() as profiled:
        for step, batch in zip(range(steps), _endless(loader), strict=False):
            if arguments.profile and step == steps - PROFILED:
                profiled.enter_context(_profiling(arguments.profile))
            loss = _loss(models, batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(controlnet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.detach().item()
            finished.append(time.perf_counter())
    steady = finished[WARM_UP : len(finished) - PROFILED if arguments.profile else None]
    return {
        "seconds": finished[-1] - finished[0],
        "seconds_to_first_step": finished[1] - started,
        "images_per_second": (len(steady) - 1) * arguments.train_batch_size / (steady[-1] - steady[0]),
        "peak_device_memory_gib": _peak_device_memory_gib(),
    }


def _load(arguments: argparse.Namespace, device: torch.device) -> _Models:
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.mixed_precision]
    frozen: dict[str, Any] = {
        name: model_class.from_pretrained(arguments.model, subfolder=name).requires_grad_(False)
        for name, model_class in {
            "vae": AutoencoderKL,
            "unet": UNet2DConditionModel,
            "text_encoder": CLIPTextModel,
        }.items()
    }
    controlnet = ControlNetModel.from_unet(frozen["unet"])
    for model in frozen.values():
        model.to(device, dtype)
    scheduler = DDPMScheduler.from_pretrained(arguments.model, subfolder="scheduler")
    return _Models(**frozen, controlnet=controlnet, scheduler=scheduler, dtype=dtype)


def _loss(models: _Models, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.profiler.record_function("vae"):
        latents = models.vae.encode(batch["pixel_values"].to(models.dtype)).latent_dist.sample()
    latents = latents * models.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
    noisy = models.scheduler.add_noise(latents.float(), noise.float(), timesteps).to(models.dtype)
    with torch.profiler.record_function("text_encoder"):
        text = models.text_encoder(batch["input_ids"], return_dict=False)[0]
    condition = batch["conditioning_pixel_values"].to(models.dtype)
    with torch.profiler.record_function("controlnet"):
        down, mid = models.controlnet(noisy, timesteps, text, condition, return_dict=False)
    with torch.profiler.record_function("unet"):
        prediction = models.unet(
            noisy,
            timesteps,
            text,
            down_block_additional_residuals=[residual.to(models.dtype) for residual in down],
            mid_block_additional_residual=mid.to(models.dtype),
            return_dict=False,
        )[0]
    is_velocity = models.scheduler.config.prediction_type == "v_prediction"
    target = models.scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    return torch.nn.functional.mse_loss(prediction.float(), target.float())


def _loader(arguments: argparse.Namespace) -> Any:
    tokenizer = CLIPTokenizer.from_pretrained(arguments.model, subfolder="tokenizer")

    def pixels(image: Any, *, signed: bool) -> torch.Tensor:
        size = (arguments.resolution, arguments.resolution)
        array = np.asarray(image.convert("RGB").resize(size, 2), np.float32) / 255
        return torch.from_numpy(array).permute(2, 0, 1) * (2 if signed else 1) - (1 if signed else 0)

    def transform(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        tokens = tokenizer(examples["text"], max_length=77, padding="max_length", truncation=True, return_tensors="pt")
        return {
            "pixel_values": [pixels(image, signed=True) for image in examples["image"]],
            "conditioning_pixel_values": [pixels(image, signed=False) for image in examples["conditioning_image"]],
            "input_ids": list(tokens.input_ids),
        }

    return torch.utils.data.DataLoader(
        _dataset(arguments.data).with_transform(transform),
        shuffle=True,
        batch_size=arguments.train_batch_size,
        num_workers=arguments.workers,
    )


def _dataset(folder: Path) -> Any:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    columns = {
        "image": [str(folder / row["image_file_name"]) for row in rows],
        "conditioning_image": [str(folder / row["conditioning_image_file_name"]) for row in rows],
        "text": [row["text"] for row in rows],
    }
    return Dataset.from_dict(columns).cast_column("image", Image()).cast_column("conditioning_image", Image())


def _endless(loader: Any) -> Iterator[dict[str, torch.Tensor]]:
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _profiling(file: Path) -> Any:
    def write(profiler: torch.profiler.profile) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        profiler.export_chrome_trace(str(file))

    return torch.profiler.profile(on_trace_ready=write)


def _peak_device_memory_gib() -> float | None:
    return torch.accelerator.max_memory_allocated() / 2**30 if torch.accelerator.is_available() else None


if __name__ == "__main__":
    main()
