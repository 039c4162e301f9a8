"""A training step of Stable Diffusion on a TPU v4, ours and that of diffusers 0.39, by the TPU compiler's estimate.

    python3 -m benchmarks.tpu_step_against_diffusers --folder FOLDER [--images 2] [--sides reference cached online]

No TPU is needed. Both steps are compiled for one chip of a v4-8, bf16, and counted alike (as by
`flax_trainer.compile_report`), so without the sum of gradients over chips, which is the same for both. `cached` is our
step on batches that bring latents and text embeddings, `online` the one that encodes images and captions, as the
reference does. FOLDER receives diffusers' environment. Each side takes ten to thirty minutes on two cores and up to
28 GB of memory.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from flax_trainer.base_models import ModelConfigs
from flax_trainer.compile_report.report import compile_report
from flax_trainer.compile_report.targets import CHIPS, Target
from flax_trainer.random_model import ARCHITECTURES
from shared.config import read_configuration
from shared.diffusion.schedule import NoiseSchedule

ONE_CHIP = Target("one chip of a v4-8", CHIPS["v4"], (1, 1, 1))
SIDES = ("reference", "cached", "online")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--architecture", choices=["tiny", "sd15", "sd21"], default="sd15")
    parser.add_argument("--images", type=int, default=2, help="per chip")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--only", choices=SIDES[1:], help="compile that one here (used by the script itself)")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(our_step(arguments)))
        return

    print(
        f"{'':<10}{'M cycles':>10}{'':>8}{'GB':>8}{'':>8}{'HBM GiB':>9}{'compiled':>10}   (compiler estimate)",
        flush=True,
    )
    first: dict[str, float] | None = None
    for side in arguments.sides:
        figures = reference_step(arguments) if side == "reference" else in_own_process(arguments, side)
        first = first or figures
        cycles, traffic = (figures[name] / first[name] for name in ("estimated_cycles", "bytes_accessed"))
        print(
            f"{side:<10}{figures['estimated_cycles'] / 1e6:>10.1f}{cycles:>8.1%}{figures['bytes_accessed'] / 1e9:>8.1f}"
            f"{traffic:>8.1%}{figures['peak_hbm_gib']:>9.2f}{figures['compile_seconds']:>8.0f} s",
            flush=True,
        )


def our_step(arguments: argparse.Namespace) -> dict[str, Any]:
    architecture = ARCHITECTURES[arguments.architecture]
    config = read_configuration(
        [
            *("--pretrained_model_name_or_path", arguments.architecture, "--resolution", str(arguments.resolution)),
            *("--train_batch_size", str(arguments.images), "--mixed_precision", "bf16"),
            "--enable_xformers_memory_efficient_attention",
        ]
    )
    configs = ModelConfigs.of(architecture.unet, architecture.vae, architecture.text_encoder)
    schedule = NoiseSchedule.from_config(architecture.scheduler)
    return compile_report(config, configs, schedule, ONE_CHIP, from_cache=arguments.only == "cached").as_json()


def in_own_process(arguments: argparse.Namespace, side: str) -> dict[str, float]:
    """So that the memory of one compilation is free before the next."""
    command = [sys.executable, "-m", "benchmarks.tpu_step_against_diffusers", *sys.argv[1:], "--only", side]
    return last_line(command)


def reference_step(arguments: argparse.Namespace) -> dict[str, float]:
    python = environment_of_diffusers(arguments.folder / "diffusers-0.39")
    architecture = arguments.folder / f"{arguments.architecture}.json"
    architecture.write_text(json.dumps(dataclasses.asdict(ARCHITECTURES[arguments.architecture])))
    return last_line(
        [
            *(str(python), "-m", "benchmarks.diffusers_flax_step", "--architecture", str(architecture)),
            *("--images", str(arguments.images), "--resolution", str(arguments.resolution)),
        ]
    )


def environment_of_diffusers(folder: Path) -> Path:
    """Its interpreter; with the compiler that is used here, so that the two sides differ by their programs alone."""
    python, is_complete = folder / "bin" / "python", folder / "is_complete"
    if not is_complete.exists():
        venv.create(folder, with_pip=True, clear=True)
        same = [f"{package}=={metadata.version(package)}" for package in ("jax", "libtpu", "flax", "optax")]
        packages = ["diffusers==0.39.0", "transformers==4.57.6", *same]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        is_complete.touch()
    return python


def last_line(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
