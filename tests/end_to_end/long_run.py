"""`python3 -m tests.end_to_end.long_run --backend flax`: do memory, open files and threads stay what they are?

A run of many tiny steps, with pictures and figures of held-out samples, TensorBoard and checkpoints every few hundred,
is watched from outside. The exit code is 0 where it is flat over its second half.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

os.environ["JAX_PLATFORMS"] = "cpu"

from flax_trainer.random_model import write_random_model
from shared.data.sources.circles import draw
from tests.end_to_end.kill_campaign.moments import last_step
from tests.end_to_end.support.running import PROJECT
from tests.end_to_end.support.tiny_runs import ONE_RESOLUTION, PROMPT

_SIZE = 16  # pixels: a step takes some 15 ms on a core
_EVERY = 400  # steps to a validation and a checkpoint
_SECONDS_BETWEEN_SAMPLES = 1.0
# MB of resident memory. In 1,000 steps: a run of a week at two steps a second would take 600 MB. For each checkpoint,
# whatever its size: TensorStore, which Orbax writes with, keeps some text of every array in each of them for ever.
MOST_GROWTH, MOST_OF_A_CHECKPOINT = 0.5, 1.0


class Sample(NamedTuple):
    """What a process has at a step; resident memory in MB."""

    step: int
    megabytes: float
    open_files: int
    threads: int


@dataclass(frozen=True)
class Verdict:
    """On the second half of a run.

    Attributes:
        growth: MB in 1,000 steps, the median of the slopes between all pairs of samples (Theil 1950, Sen 1968), which
            a few samples, taken during a validation or a save, do not move.
        checkpoints: how many of them 1,000 steps have.
        open_files, threads: the most in each quarter of the run.
    """

    checkpoints: float
    first_megabytes: float
    last_megabytes: float
    growth: float
    open_files: list[int]
    threads: list[int]

    @property
    def faults(self) -> list[str]:
        """None where all is flat: what the last quarter has, an earlier one had too."""
        most = MOST_GROWTH + self.checkpoints * MOST_OF_A_CHECKPOINT
        found = [f"{self.growth:.2f} MB more memory in 1,000 steps"] if self.growth > most else []
        for name, had in (("open files", self.open_files), ("threads", self.threads)):
            if had[-1] > max(had[:-1]):
                found.append(f"{name} still become more: {had}")
        return found


def verdict(samples: Sequence[Sample], checkpoints: float = 0.0) -> Verdict:
    """Of samples in order, of which those of the first half only tell what a run opens and starts."""
    last = samples[-1].step
    quarters = [[one for one in samples if number * last < 4 * one.step <= (number + 1) * last] for number in range(4)]
    second_half = quarters[2] + quarters[3]
    return Verdict(
        checkpoints=checkpoints,
        first_megabytes=statistics.median(one.megabytes for one in quarters[2]),
        last_megabytes=statistics.median(one.megabytes for one in quarters[3]),
        growth=1000 * _slope([(one.step, one.megabytes) for one in second_half]),
        open_files=[max(one.open_files for one in quarter) for quarter in quarters],
        threads=[max(one.threads for one in quarter) for quarter in quarters],
    )


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """The median of those between pairs of different steps."""
    points = points[:: max(1, len(points) // 300)]
    pairs = ((one, other) for number, one in enumerate(points) for other in points[number + 1 :])
    return statistics.median((other[1] - one[1]) / (other[0] - one[0]) for one, other in pairs if other[0] > one[0])


def watched(command: Sequence[str], run: Path, output: Path) -> list[Sample]:
    """Run it to its end; what its process has, about every second from its first step on.

    Raises:
        RuntimeError: it failed.
    """
    samples: list[Sample] = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with output.open("w") as file:
        started = subprocess.Popen(
            [sys.executable, *command], cwd=PROJECT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        process = psutil.Process(started.pid)
        while started.poll() is None:
            time.sleep(_SECONDS_BETWEEN_SAMPLES)
            step = last_step(run)
            if step > 0 and started.poll() is None:
                memory, threads = process.memory_info().rss / 1e6, process.num_threads()
                samples.append(Sample(step, memory, process.num_fds(), threads))
    if started.returncode:
        raise RuntimeError(f"It ended with {started.returncode}: {output.read_text(errors='replace')[-3000:]}")
    return samples


def command_of(backend: str, steps: int, folder: Path) -> list[str]:
    base_model, condition = folder / "base", folder / "condition.png"
    write_random_model(ONE_RESOLUTION, base_model)
    draw(0, _SIZE, seed=1).conditioning_image.save(condition)
    return [
        *(str(PROJECT / f"train_{backend}.py"), "--pretrained_model_name_or_path", str(base_model)),
        *("--resolution", str(_SIZE), "--generated_circles", "64", "--train_batch_size", "1"),
        *("--max_train_steps", str(steps), "--num_evaluation_samples", "2", "--dataloader_num_workers", "2"),
        *("--validation_image", str(condition), "--validation_prompt", PROMPT, "--num_validation_images", "1"),
        *("--validation_steps", str(_EVERY), "--checkpointing_steps", str(_EVERY), "--checkpoints_total_limit", "2"),
        *("--output_dir", str(folder / "run")),
    ]


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.end_to_end.long_run", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--backend", choices=["flax", "torch"], required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    arguments = parser.parse_args(words)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="long-run-") as name:
        folder = Path(name)
        command = command_of(arguments.backend, arguments.steps, folder)
        found = verdict(watched(command, folder / "run", folder / "output.txt"), checkpoints=1000 / _EVERY)
    print(
        f"{arguments.backend}, {arguments.steps:,} steps in {time.monotonic() - began:,.0f} s: memory "
        f"{found.first_megabytes:,.0f} MB in the third quarter, {found.last_megabytes:,.0f} MB in the last, "
        f"{found.growth:+.3f} MB in 1,000 steps; most open files in each quarter {found.open_files}, threads "
        f"{found.threads}"
    )
    for fault in found.faults:
        print(f"not flat: {fault}")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
