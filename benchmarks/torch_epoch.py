"""One epoch with the PyTorch backend, and with a loop written directly on diffusers' models: which is faster?

    python3 -m benchmarks.torch_epoch --folder FOLDER [--samples 512] [--resolution 64] [--train_batch_size 8]

Both train on the same image folder of PNG files (made in FOLDER), float32 unless --mixed_precision says otherwise, in
processes of their own, in turns, and fetch the loss of every step. The loop does what diffusers' train_controlnet.py
does: a `datasets` image folder through a DataLoader, noise and timesteps drawn on the device, AdamW, clipping. The
times are the epoch's, from the first batch asked for to the last optimizer step, without loading and saving.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shared.config.demo import BASE_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default=str(BASE_MODEL))
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--workers", type=int, default=0, help="threads here, DataLoader processes in the reference")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only_reference", action="store_true", help="one epoch of it (used by the script itself)")
    arguments = parser.parse_args()
    if arguments.only_reference:
        print(json.dumps(reference_epoch(arguments)))
        return

    write_image_folder(arguments.folder / "data", arguments.samples, arguments.resolution)
    ours, theirs = [], []
    for round_ in range(arguments.rounds):
        ours.append(our_epoch(arguments, arguments.folder / f"run-{time.time_ns()}"))
        command = [sys.executable, "-m", "benchmarks.torch_epoch", *sys.argv[1:], "--only_reference"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        theirs.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"round {round_ + 1}: ours {ours[-1]:.2f} s, reference {theirs[-1]:.2f} s", flush=True)
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(
        f"median: ours {statistics.median(ours):.2f} s, reference {statistics.median(theirs):.2f} s, "
        f"ours is {ratio:.2f} times as fast"
    )


def write_image_folder(folder: Path, samples: int, resolution: int) -> None:
    """Circles as PNG files with a metadata.jsonl, as diffusers' guide describes an image folder."""
    from shared.data.sources.circles import draw

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


def our_epoch(arguments: argparse.Namespace, run: Path) -> float:
    """Seconds, from the run's own figures."""
    command = [
        *(sys.executable, "train_torch.py", "--pretrained_model_name_or_path", arguments.model),
        *("--train_data_dir", str(arguments.folder / "data"), "--resolution", str(arguments.resolution)),
        *("--train_batch_size", str(arguments.train_batch_size), "--num_train_epochs", "1"),
        *("--mixed_precision", arguments.mixed_precision, "--dataloader_num_workers", str(arguments.workers)),
        *("--checkpointing_steps", "1000000", "--report_to", "none", "--output_dir", str(run)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return sum(arguments.train_batch_size / entry["images_per_second"] for entry in entries)


def reference_epoch(arguments: argparse.Namespace) -> float:
    """Seconds of the loop below."""
    import numpy as np
    import torch
    from accelerate import Accelerator
    from datasets import Dataset, Image
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    accelerator = Accelerator(mixed_precision=arguments.mixed_precision, cpu=not torch.accelerator.is_available())
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.mixed_precision]
    tokenizer = CLIPTokenizer.from_pretrained(arguments.model, subfolder="tokenizer")
    frozen: dict[str, Any] = {
        name: model_class.from_pretrained(arguments.model, subfolder=name).requires_grad_(False)
        for name, model_class in {
            "vae": AutoencoderKL,
            "unet": UNet2DConditionModel,
            "text_encoder": CLIPTextModel,
        }.items()
    }
    scheduler = DDPMScheduler.from_pretrained(arguments.model, subfolder="scheduler")
    controlnet: Any = ControlNetModel.from_unet(frozen["unet"])
    for model in frozen.values():
        model.to(accelerator.device, dtype)
    optimizer: Any = torch.optim.AdamW(controlnet.parameters(), lr=5e-6)

    folder = arguments.folder / "data"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    columns = {
        "image": [str(folder / row["image_file_name"]) for row in rows],
        "conditioning_image": [str(folder / row["conditioning_image_file_name"]) for row in rows],
        "text": [row["text"] for row in rows],
    }
    dataset = Dataset.from_dict(columns).cast_column("image", Image()).cast_column("conditioning_image", Image())

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

    loader: Any = torch.utils.data.DataLoader(
        dataset.with_transform(transform),
        shuffle=True,
        batch_size=arguments.train_batch_size,
        num_workers=arguments.workers,
    )
    controlnet, optimizer, loader = accelerator.prepare(controlnet, optimizer, loader)
    controlnet.train()

    started = time.perf_counter()
    for batch in loader:
        latents = frozen["vae"].encode(batch["pixel_values"].to(dtype)).latent_dist.sample()
        latents = latents * frozen["vae"].config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents.float(), noise.float(), timesteps).to(dtype)
        text = frozen["text_encoder"](batch["input_ids"], return_dict=False)[0]
        condition = batch["conditioning_pixel_values"].to(dtype)
        down, mid = controlnet(noisy, timesteps, text, condition, return_dict=False)
        prediction = frozen["unet"](
            noisy,
            timesteps,
            text,
            down_block_additional_residuals=[residual.to(dtype) for residual in down],
            mid_block_additional_residual=mid.to(dtype),
            return_dict=False,
        )[0]
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(controlnet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.detach().item()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
