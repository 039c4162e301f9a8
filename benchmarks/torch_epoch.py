"""One epoch with the PyTorch backend, and with a loop written directly on diffusers' models: which is faster?

    python3 -m benchmarks.torch_epoch --folder FOLDER [--samples 512] [--resolution 64] [--train_batch_size 8]

Both train on the same image folder of PNG files (made in FOLDER), float32 unless --mixed_precision says otherwise, in
processes of their own, in turns. The loop is `benchmarks.diffusers_loop`. The times are the epoch's, from the first
batch asked for to the last optimizer step, without loading and saving.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.image_folder import write_image_folder
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
    arguments = parser.parse_args()
    write_image_folder(arguments.folder / "data", arguments.samples, arguments.resolution)
    ours, theirs = [], []
    for round_ in range(arguments.rounds):
        ours.append(our_epoch(arguments, arguments.folder / f"run-{time.time_ns()}"))
        theirs.append(reference_epoch(arguments))
        print(f"round {round_ + 1}: ours {ours[-1]:.2f} s, reference {theirs[-1]:.2f} s", flush=True)
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(
        f"median: ours {statistics.median(ours):.2f} s, reference {statistics.median(theirs):.2f} s, "
        f"ours is {ratio:.2f} times as fast"
    )


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
    """Seconds, as the loop counts them."""
    command = [
        *(sys.executable, "-m", "benchmarks.diffusers_loop", "--model", arguments.model),
        *("--data", str(arguments.folder / "data"), "--resolution", str(arguments.resolution)),
        *("--train_batch_size", str(arguments.train_batch_size), "--mixed_precision", arguments.mixed_precision),
        *("--workers", str(arguments.workers)),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


if __name__ == "__main__":
    main()
