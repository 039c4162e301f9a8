"""The warm process of one side: it has imported what its kinds need, and forks a child for every case.

It reads `{"number": N, "seconds": S}` per line and answers each with a result. `python3 -m tests.hostile.server` is
started by `tests.hostile.campaign`.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

# Before any library looks at them.
os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # a pool of threads does not survive a fork
    OPENBLAS_NUM_THREADS="1",
    MPLBACKEND="agg",
    TQDM_DISABLE="1",
    WANDB_MODE="disabled",
)

from tests.hostile.case import Case
from tests.hostile.judge import judged
from tests.hostile.kinds import kind_of, warm_up
from tests.hostile.watched import Bounds, remove, watch

_PROGRAMS_THAT_ARE_TRAPS = ("gs", "gswin64c", "ffmpeg", "curl", "wget", "aws", "gsutil")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("side")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--originals", type=Path, required=True)
    parser.add_argument("--mib", type=float, required=True)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    answers = _own_standard_output()
    _prepare(arguments.side, arguments.originals, arguments.work)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        bounds = Bounds(request["seconds"], arguments.mib)
        print(_answer(arguments, request["number"], bounds), file=answers, flush=True)


def _answer(arguments: argparse.Namespace, number: int, bounds: Bounds) -> str:
    kind = kind_of(number)
    folder = arguments.work / str(number)
    seen = watch(kind.build, arguments.seed, number, folder, bounds)
    result = judged(kind.name, Case.of(arguments.seed, number, folder), seen, bounds)
    if arguments.keep is not None and not result.is_good:
        _keep(folder, arguments.keep / f"{arguments.seed}:{number}")
    remove(folder)
    return json.dumps(result.as_json())


def _keep(folder: Path, place: Path) -> None:
    remove(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    os.rename(folder, place)


def _own_standard_output() -> TextIO:
    """For answers alone; what anything else prints goes to stderr."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def _prepare(side: str, originals: Path, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    os.environ["HOSTILE_ORIGINALS"] = str(originals)
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR"):
        os.environ[name] = str(work / "home")
    traps = work / "bin"
    traps.mkdir(exist_ok=True)
    for name in _PROGRAMS_THAT_ARE_TRAPS:
        trap = traps / name
        trap.write_text('#!/bin/sh\necho "$0 $*" >> "$TMPDIR/executed"\n')
        trap.chmod(0o755)
    os.environ["PATH"] = f"{traps}{os.pathsep}{os.environ['PATH']}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warm_up(side)
    warnings.filterwarnings("ignore", message=r".*os\.fork\(\).*")


if __name__ == "__main__":
    main()
