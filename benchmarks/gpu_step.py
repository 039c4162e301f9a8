"""A training step on one accelerator: a loop on diffusers' models, ours in PyTorch, ours in JAX, one after the other.

    python3 -m benchmarks.gpu_step --folder FOLDER [--architecture sd15] [--train_batch_sizes 16] [--json FILE]

Makes a Stable Diffusion of random weights (or takes --model) and a folder of pictures, and trains on them with every
side, each a process of its own that begins without anything compiled before:

- diffusers: `benchmarks.diffusers_loop`, what diffusers' train_controlnet.py does;
- torch, torch-xformers, torch-compiled: train_torch.py without flags, and with those that the names say;
- flax: train_flax.py without flags;
- flax-again, torch-compiled-again: a second start of the same command, which finds what the first has compiled.

It prints images per second, the ratio to diffusers, model FLOPs utilisation, peak device memory, the time to the first
step, and where a step's time goes on the device. A side that would not end within --minutes is given up, and one that
fails is told with its last line. Without an accelerator it runs on the CPU, which is good for trying it only:

    python3 -m benchmarks.gpu_step --folder FOLDER --architecture tiny --resolution 64 --train_batch_sizes 2 --steps 10
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.image_folder import write_image_folder

ROOT = Path(__file__).parents[1]
AGAIN = "-again"
PROFILED = 3
FIRST_STEADY = 8  # the profiled steps are the third to the fifth, and what follows them settles
LOGGED = 2  # steps of an entry in metrics.jsonl
_TORCH_FLAGS = {
    "torch": [],
    "torch-xformers": ["--enable_xformers_memory_efficient_attention"],
    "torch-compiled": ["--torch_compile"],
}
SIDES = (
    "diffusers",
    "torch",
    "flax",
    f"flax{AGAIN}",
    "torch-compiled",
    f"torch-compiled{AGAIN}",
    "torch-xformers",
)


@dataclass
class Figures:
    """Of one side at one batch size; `failed` says why there are none."""

    images_per_second: float | None = None
    mfu: float | None = None
    model_tflops_per_second: float | None = None
    peak_device_memory_gib: float | None = None
    seconds_to_first_step: float | None = None
    device_time: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None


def main() -> int:
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    arguments.runs = arguments.folder / time.strftime("%Y%m%d_%H%M%S")  # nothing of an earlier time is found there
    arguments.runs.mkdir()
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.model is None:
        arguments.model = arguments.folder / "model"
        make_model(arguments)
    write_image_folder(arguments.folder / "data", arguments.samples, arguments.resolution)
    results: dict[str, dict[str, Figures]] = {}
    print(f"\n{HEADER}", flush=True)
    for batch in arguments.train_batch_sizes:
        of_batch = results.setdefault(str(batch), {})
        for side in arguments.sides:
            of_batch[side] = measured(side, batch, arguments, deadline)
            complete(of_batch)
            print(row(side, batch, of_batch), flush=True)
    print_device_time(results)
    if arguments.json:
        content = {batch: {side: vars(figures) for side, figures in sides.items()} for batch, sides in results.items()}
        arguments.json.write_text(json.dumps(facts(arguments) | {"results": content}, indent=2) + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the model, the data, and a folder each time")
    parser.add_argument("--architecture", choices=["tiny", "sd15", "sd21"], default="sd15")
    parser.add_argument("--model", type=Path, help="a base model's folder, in place of one of --architecture")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train_batch_sizes", nargs="+", type=int, default=[16])
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="bf16")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def make_model(arguments: argparse.Namespace) -> None:
    """In a process of its own, so that its memory is free again."""
    if (arguments.model / "model_index.json").exists():
        return
    command = [sys.executable, "-m", "flax_trainer.random_model", arguments.architecture, str(arguments.model)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def measured(side: str, batch: int, arguments: argparse.Namespace, deadline: float) -> Figures:
    """The figures of one side."""
    measure: Callable[..., Figures] = diffusers_figures if side == "diffusers" else partial(our_figures, side)
    run = arguments.runs / f"{side}-{batch}"
    return figures_or_reason(measure, run, batch, arguments, max(1.0, deadline - time.monotonic()))


def figures_or_reason(measure: Callable[..., Figures], run: Path, *more: Any) -> Figures:
    """What goes wrong is one of the figures."""
    try:
        return measure(run, *more)
    except subprocess.TimeoutExpired:
        return Figures(failed="the time was up")
    except subprocess.CalledProcessError as error:
        lines = _log_of(run).read_text(errors="replace").strip().splitlines()
        return Figures(failed=f"exit code {error.returncode}: {lines[-1] if lines else ''}"[:300])


def diffusers_figures(run: Path, batch: int, arguments: argparse.Namespace, seconds: float) -> Figures:
    trace = run.with_name(f"{run.name}.trace.json")
    command = [sys.executable, "-m", "benchmarks.diffusers_loop", "--model", str(arguments.model)]
    command += ["--data", str(arguments.folder / "data"), *common_flags(batch, arguments)]
    command += ["--workers", str(arguments.workers), "--steps", str(arguments.steps), "--profile", str(trace)]
    output = ran(command, run, seconds)
    told = json.loads(output.splitlines()[-1])
    # In a process that imports torch, for a machine may have JAX alone on its accelerator.
    summary = [sys.executable, "-m", "torch_trainer.profiling.device_time", str(trace), "--steps", str(PROFILED)]
    device_time = json.loads(ran(summary, run, seconds))
    trace.unlink()
    return Figures(
        images_per_second=told["images_per_second"],
        peak_device_memory_gib=told["peak_device_memory_gib"],
        seconds_to_first_step=told["seconds_to_first_step"],
        device_time=device_time,
    )


def our_figures(side: str, run: Path, batch: int, arguments: argparse.Namespace, seconds: float) -> Figures:
    first = side.removesuffix(AGAIN)
    flags = ["--pretrained_model_name_or_path", str(arguments.model)]
    flags += ["--train_data_dir", str(arguments.folder / "data"), *common_flags(batch, arguments)]
    flags += ["--dataloader_num_workers", str(arguments.workers), "--max_train_steps", str(arguments.steps)]
    flags += ["--logging_steps", str(LOGGED), "--report_to", "none", "--output_dir", str(run)]
    if side == first:
        flags += ["--profile_steps", str(PROFILED)]
    script = "train_flax.py" if first == "flax" else "train_torch.py"
    # A folder for each first start: with nothing in it, it is the first.
    compiled = arguments.runs / f"compiled-{first}-{batch}"
    environment = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    ran([sys.executable, script, *flags, *_TORCH_FLAGS.get(first, [])], run, seconds, environment)
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    speed = steady_speed(run)
    traced = run / "logs" / "profile_steps" / "device_time.json"
    flops_per_image = report["model_tflops_per_second"] / report["images_per_second"]
    share = report["mfu"] / report["model_tflops_per_second"] if "mfu" in report else None
    return Figures(
        images_per_second=speed,
        model_tflops_per_second=speed * flops_per_image,
        mfu=None if share is None else speed * flops_per_image * share,
        peak_device_memory_gib=report["peak_device_memory_gib"],
        seconds_to_first_step=report["seconds_to_first_step"],
        device_time=json.loads(traced.read_text(encoding="utf-8")) if traced.exists() else {},
    )


def common_flags(batch: int, arguments: argparse.Namespace) -> list[str]:
    return [
        *("--resolution", str(arguments.resolution), "--train_batch_size", str(batch)),
        *("--mixed_precision", arguments.mixed_precision),
    ]


def ran(command: list[str], run: Path, seconds: float, environment: dict[str, str] | None = None) -> str:
    """Its output; its messages are in a file beside the run's folder."""
    with _log_of(run).open("a") as log:
        done = subprocess.run(
            command,
            check=True,
            cwd=ROOT,
            env={"CUDA_VISIBLE_DEVICES": "0"} | os.environ | (environment or {}),  # a single one, unless told otherwise
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            timeout=seconds,
        )
    return done.stdout


def _log_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def steady_speed(run: Path) -> float:
    """Images per second of the steps after those that are profiled, without the last, which nothing follows."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [entry["images_per_second"] for entry in entries[:-1] if entry["step"] >= FIRST_STEADY + LOGGED]
    return len(speeds) / sum(1 / speed for speed in speeds)


def complete(sides: dict[str, Figures]) -> None:
    """The reference's utilisation, from the FLOPs that another side has counted: the model is the same."""
    known = next((figures for figures in sides.values() if figures.model_tflops_per_second), None)
    for figures in sides.values():
        if known is None or figures.images_per_second is None or figures.model_tflops_per_second is not None:
            continue
        assert known.images_per_second is not None
        ratio = figures.images_per_second / known.images_per_second
        figures.model_tflops_per_second = (known.model_tflops_per_second or 0) * ratio
        figures.mfu = None if known.mfu is None else known.mfu * ratio


HEADER = (
    "| side | images per step | images/s | of diffusers | MFU | device memory, GiB | first step after, s |\n"
    "|---|---|---|---|---|---|---|"
)


def row(side: str, batch: int, sides: dict[str, Figures]) -> str:
    """A line of the table."""
    figures, reference = sides[side], sides.get("diffusers")
    if figures.failed is not None:
        return f"| {side} | {batch} | {figures.failed} | | | | |"
    assert figures.images_per_second is not None
    ratio = None
    if reference is not None and reference.images_per_second:
        ratio = figures.images_per_second / reference.images_per_second
    cells = [
        f"{figures.images_per_second:.1f}",
        _cell(ratio, ".2f"),
        _cell(figures.mfu, ".1%"),
        _cell(figures.peak_device_memory_gib, ".1f"),
        _cell(figures.seconds_to_first_step, ".0f"),
    ]
    return f"| {side} | {batch} | {' | '.join(cells)} |"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def print_device_time(results: dict[str, dict[str, Figures]]) -> None:
    """Where a step's time goes, in milliseconds."""
    for batch, sides in results.items():
        traced = {side: figures.device_time for side, figures in sides.items() if figures.device_time}
        for table, title in (("by_part", "part of the model"), ("by_kind", "kind of work")):
            names = dict.fromkeys(name for times in traced.values() for name in times[table])
            print(f"\n| {batch} images, ms per step on the device: {title} | {' | '.join(traced)} |")
            print(f"|---|{'---|' * len(traced)}")
            for name in names:
                cells = [_cell(times[table].get(name, 0.0) * 1e3, ".1f") for times in traced.values()]
                print(f"| {name} | {' | '.join(cells)} |")


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures belong to."""
    named = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    reports = sorted(arguments.runs.glob("*/report.json"))
    report = json.loads(reports[0].read_text(encoding="utf-8")) if reports else {}
    return {
        "arguments": named,
        "devices": report.get("devices"),
        "versions": {
            name: version
            for path in reports
            for name, version in json.loads(path.read_text(encoding="utf-8"))["versions"].items()
        },
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main())
