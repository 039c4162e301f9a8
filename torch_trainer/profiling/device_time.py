"""How long the devices worked in a trace of torch.profiler.

    python3 -m torch_trainer.profiling.device_time TRACE [--steps 1]

prints it as JSON.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from shared.profiling.device_time import DeviceTime, Piece
from torch_trainer.profiling.kineto import Trace, read_trace
from torch_trainer.profiling.work import work_in


def device_time(trace: Trace, steps: int = 1) -> DeviceTime:
    """Of a trace that holds so many whole steps: kernels and copies of accelerators, or without any, CPU operations.

    The parts are found where the trace has the ranges of `torch_trainer.training.step`.
    """
    return DeviceTime.of((Piece(work.part, work.kind, work.busy) for work in work_in(trace)), steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--steps", type=int, default=1)
    arguments = parser.parse_args()
    print(json.dumps(asdict(device_time(read_trace(arguments.trace), arguments.steps))))
