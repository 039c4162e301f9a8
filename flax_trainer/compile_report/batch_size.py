"""The largest batch per chip that fits, without and with gradient checkpointing."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import get_args

from flax_trainer.base_models import ModelConfigs
from flax_trainer.compile_report.in_subprocess import CompilerCrashedError, in_subprocess
from flax_trainer.compile_report.report import GIB, DoesNotFitError, Report, compile_report
from flax_trainer.compile_report.targets import Target
from flax_trainer.compile_report.text import batch_size_line
from flax_trainer.models.layers.compute import CheckpointingPolicy
from shared.config import TrainConfig
from shared.diffusion.schedule import NoiseSchedule

NONE = "none"
# How many times what was seen to fit may be tried next: less from half of the memory on, for near its end the compiler
# saves, and predictions fail.
FURTHEST = 8
FURTHEST_FROM_HALF = 2


def find_batch_size(
    config: TrainConfig, configs: ModelConfigs, schedule: NoiseSchedule, target: Target, *, from_cache: bool
) -> dict[str, Report | None]:
    """Print every try; returns, by what the backward pass recomputes, the report of the largest batch that fits."""

    def report_of(policy: CheckpointingPolicy | None, batch_size: int) -> Report | None:
        tried = dataclasses.replace(
            config,
            train_batch_size=batch_size,
            gradient_checkpointing=policy is not None,
            gradient_checkpointing_policy=policy or config.gradient_checkpointing_policy,
        )
        report, failure = None, ""
        try:
            report = in_subprocess(compile_report, tried, configs, schedule, target, from_cache=from_cache)
        except DoesNotFitError:
            failure = "does not fit"
        except CompilerCrashedError:
            failure = "the compiler crashed"
        print(batch_size_line(policy or NONE, batch_size, report, failure), flush=True)
        return report

    policies: tuple[CheckpointingPolicy | None, ...] = (None, *get_args(CheckpointingPolicy))
    capacity = target.chip.hbm_gib * GIB
    found = {
        policy or NONE: search(partial(report_of, policy), config.train_batch_size, capacity) for policy in policies
    }
    for name, largest in found.items():
        size = "nothing" if largest is None else f"--train_batch_size {largest.config.train_batch_size}"
        print(f"{name}: {size} fits")
    return found


def search(report_of: Callable[[int], Report | None], start: int, capacity: float) -> Report | None:
    """The report of the largest batch size that fits into so many bytes.

    Each try is a compilation, so what the first two need says where the largest is, and sizes beyond 16 are told apart
    by an eighth.
    """
    fitting: dict[int, Report] = {}
    too_large: int | None = None
    size: int | None = start
    while size:
        report = report_of(size)
        if report is None:
            too_large = size
        else:
            fitting[size] = report
        size = _next_size(fitting, too_large, capacity)
    return fitting[max(fitting)] if fitting else None


def _next_size(fitting: dict[int, Report], too_large: int | None, capacity: float) -> int | None:
    """None or 0 when nothing is left to try."""
    best = max(fitting, default=0)
    step = max(1, best // 8)
    if too_large is not None:
        return (best + too_large) // 2 if too_large - best > step else None
    if len(fitting) == 1:
        return 2 * best
    smaller = sorted(fitting)[-2]
    needed, of_smaller = (fitting[size].memory.peak for size in (best, smaller))
    of_an_image = max((needed - of_smaller) / (best - smaller), 1)
    predicted = best + int((capacity - needed) / of_an_image)
    # Memory may not grow from a few images to a few more.
    return min(max(predicted, best + step), best * (FURTHEST if needed < capacity / 2 else FURTHEST_FROM_HALF))
