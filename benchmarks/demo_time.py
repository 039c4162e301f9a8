"""How long does the demo take, and how good does it get? This code and, by turns, another checkout of this repository.

    python3 -m benchmarks.demo_time --folder FOLDER [--backends flax torch] [--seeds 3] [--against CHECKOUT]

Every run is a process of its own, `train_flax.py` or `train_torch.py` with its checkout's own flags for the demo and a
seed. The time is that of the whole process, imports and saving included. Let nothing else run meanwhile.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parents[1]
_FIGURES = ("circle_iou", "circle_iou_untrained", "color_accuracy", "convergence_step")
_DEMO = """
import runpy, sys
try:
    from shared.config.demo import demo_arguments
except ModuleNotFoundError:  # where it was until November 2026
    from shared.demo import demo_arguments
program, seed, folder = sys.argv[1:]
sys.argv = [program, *demo_arguments(), "--seed", seed, "--output_dir", folder]
runpy.run_path(program, run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs' folders go; it must not exist")
    parser.add_argument("--backends", nargs="+", choices=["flax", "torch"], default=["flax", "torch"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[3])
    parser.add_argument("--against", type=Path, help="a checkout of another commit, run by turns with this one")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)

    print(f"| backend | seed | code | {' | '.join(_FIGURES)} | seconds | of the other's |")
    print(f"|{'---|' * (len(_FIGURES) + 5)}", flush=True)
    for backend in arguments.backends:
        for seed in arguments.seeds:
            name = f"{backend}-{seed}"
            other = None
            if arguments.against is not None:
                other = run_demo(arguments.against, backend, seed, arguments.folder / f"{name}-other")
                print(row(backend, seed, "other", other), flush=True)
            this = run_demo(_HERE, backend, seed, arguments.folder / name)
            print(row(backend, seed, "this", this, other), flush=True)


def run_demo(checkout: Path, backend: str, seed: int, folder: Path) -> dict[str, Any]:
    """What its report.json says, with the `seconds` of the whole process."""
    command = [sys.executable, "-c", _DEMO, f"train_{backend}.py", str(seed), str(folder.resolve())]
    started = time.perf_counter()
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        subprocess.run(command, check=True, cwd=checkout, stdout=log, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - started
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report | {"seconds": seconds}


def row(backend: str, seed: int, code: str, run: dict[str, Any], other: dict[str, Any] | None = None) -> str:
    """A line of the table."""
    figures = [f"{run[name]:.3f}" if isinstance(run[name], float) else str(run[name]) for name in _FIGURES]
    share = "" if other is None else f"{run['seconds'] / other['seconds']:.0%}"
    cells = [backend, str(seed), code, *figures, f"{run['seconds']:.0f}", share]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
