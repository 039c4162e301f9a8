"""The made model as a folder: diffusers' layout, and a README that says where it comes from and what it is worth."""

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

NOISE_SCHEDULE = {  # Stable Diffusion 2.1's
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "clip_sample": False,
}


def write_folder(
    folder: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Write everything but the tokenizer, which stands there already, for `StableDiffusionPipeline.from_pretrained`.

    VAE and UNet are stored in float16. The text encoder stays in float32: transformers computes in the dtype it finds.
    """
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, set_alpha_to_one=False, steps_offset=1)
    vae.half().save_pretrained(folder / "vae")
    unet.half().save_pretrained(folder / "unet")
    text_encoder.save_pretrained(folder / "text_encoder")
    scheduler.save_pretrained(folder / "scheduler")
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_config(folder)


def write_readme(
    folder: Path, arguments: argparse.Namespace, minutes: float, figures: dict[str, dict[str, float]]
) -> None:
    """Write README.md: how the model was made, on what, how long it took, and what it measures."""
    options = {name: value for name, value in vars(arguments).items() if name != "output_dir"}
    command = " ".join(f"--{name} {value}" for name, value in options.items())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "numpy"))
    columns = list(next(iter(figures.values())))
    rows = [
        f"| {what} | " + " | ".join(f"{values[column]:.3f}" for column in columns) + " |"
        for what, values in figures.items()
    ]
    (folder / "README.md").write_text(
        _README.format(
            command=f"python3 -m torch_trainer.make_demo_model {command} --output_dir shared/demo_model",
            minutes=minutes,
            threads=torch.get_num_threads(),
            hardware=f"{platform.machine()} ({os.cpu_count()} CPU cores)",
            software=f"Python {platform.python_version()}, {versions}",
            test_circles=arguments.test_circles,
            header="| | " + " | ".join(columns) + " |\n|---" * 1 + "|---" * len(columns) + "|",
            rows="\n".join(rows),
        ),
        encoding="utf-8",
    )


_README = """\
# The demo's base model

A tiny text-to-image latent diffusion model in diffusers' folder layout, trained from nothing on generated circles
("burly wood circle with orange background", 64 by 64 pixels) without any conditioning image. It knows the 148 CSS
colour names and places its circles where it likes; a ControlNet teaches it to place them where an outline says.

Made by

    {command}

in {minutes:.0f} minutes with {threads} threads on {hardware}; {software}.

Measured on {test_circles} circles that training did not see, captions with UniPC in 20 steps:

{header}
{rows}

`circle_iou` compares the disc drawn with the disc asked for; for captions, which name no place, with the round disc of
its own area and centre. `color_error` is the Euclidean RGB distance to the named colours (0 to 441), `color_accuracy`
the share of pictures whose colours are both within a CIEDE2000 difference of 10.

Guidance from 1 to 5 suits it; 3 is best. At 7.5 second-order UniPC is numerically unstable in as few as 20 steps, for a
caption decides these pictures' colours wholly; more steps, or DDIM, are stable there too.
"""
