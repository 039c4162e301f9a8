"""Trains the full-size Stable Diffusion 1.5 (random weights, made here) for a few steps and prints time and memory.

    python3 -m benchmarks.full_size_run --folder FOLDER [--steps 2] [--mixed_precision no]

FOLDER receives the model (4.3 GB) and the run. The training is an ordinary `train_flax.py` in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from flax_trainer.random_model import ARCHITECTURES, write_random_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    arguments = parser.parse_args()

    model, run = arguments.folder / "sd15", arguments.folder / f"run-{time.time_ns()}"
    if not model.exists():
        write_random_model(ARCHITECTURES["sd15"], model)
    started = time.perf_counter()
    command = [
        *(sys.executable, "train_flax.py", "--pretrained_model_name_or_path", str(model)),
        *("--generated_circles", "64", "--resolution", str(arguments.resolution)),
        *("--train_batch_size", str(arguments.train_batch_size), "--max_train_steps", str(arguments.steps)),
        *("--mixed_precision", arguments.mixed_precision, "--output_dir", str(run)),
    ]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started

    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(f"whole process           {seconds:8.1f} s")
    for step in steps:
        print(
            f"step {step['step']:<4} loss {step['loss']:.5f} "
            f"{arguments.train_batch_size / step['images_per_second']:8.1f} s"
        )
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"peak resident memory    {peak_kib / 2**20:8.2f} GiB")


if __name__ == "__main__":
    main()
