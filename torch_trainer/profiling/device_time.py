"""How long the devices worked in a trace, by part of the model and by kind of work."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_trainer.profiling.kineto import read_trace
from torch_trainer.profiling.work import work_in

OUTSIDE = "other"


@dataclass(frozen=True)
class DeviceTime:
    """Seconds per step, most first; either dict adds up to `total`.

    Attributes:
        by_part: of `shared.profiling.parts.PARTS`, forward and backward ("unet backward") apart, and `OUTSIDE`.
        by_kind: of `torch_trainer.profiling.kinds.KINDS`.
        total: what runs at the same time, on several streams or threads, counts for each.
    """

    by_part: dict[str, float]
    by_kind: dict[str, float]
    total: float


def device_time(trace: Path | Mapping[str, Any], steps: int = 1) -> DeviceTime:
    """Of a trace that holds so many whole steps: kernels and copies of accelerators, or without any, CPU operations.

    Args:
        trace: the file that `torch.profiler.profile.export_chrome_trace` wrote, or its content. The parts are found
            where the trace was made of `torch_trainer.training.step`.
        steps: a time is the mean over them.
    """
    work = work_in(read_trace(trace))
    by_part = _sums(((piece.part or OUTSIDE, piece.busy) for piece in work), steps)
    by_kind = _sums(((piece.kind, piece.busy) for piece in work), steps)
    return DeviceTime(by_part, by_kind, sum(piece.busy for piece in work) / 1e9 / steps)


def _sums(nanoseconds: Iterable[tuple[str, int]], steps: int) -> dict[str, float]:
    sums: dict[str, int] = defaultdict(int)
    for name, busy in nanoseconds:
        sums[name] += busy
    return {name: busy / 1e9 / steps for name, busy in sorted(sums.items(), key=lambda entry: -entry[1])}
