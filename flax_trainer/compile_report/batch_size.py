"""The largest batch per chip that fits, without and with gradient checkpointing."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import get_args

from flax_trainer.base_models import ModelConfigs
from flax_trainer.compile_report.report import DoesNotFitError, Report, compile_report
from flax_trainer.compile_report.targets import Target
from flax_trainer.compile_report.text import batch_size_line
from flax_trainer.models.gradient_checkpointing import CheckpointingPolicy
from shared.config import TrainConfig
from shared.diffusion.schedule import NoiseSchedule

NONE = "none"


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
        try:
            report = compile_report(tried, configs, schedule, target, from_cache=from_cache)
        except DoesNotFitError:
            report = None
        print(batch_size_line(policy or NONE, batch_size, report), flush=True)
        return report

    policies: tuple[CheckpointingPolicy | None, ...] = (None, *get_args(CheckpointingPolicy))
    found = {policy or NONE: search(partial(report_of, policy), config.train_batch_size) for policy in policies}
    for name, largest in found.items():
        size = "nothing" if largest is None else f"--train_batch_size {largest.config.train_batch_size}"
        print(f"{name}: {size} fits")
    return found


def search(fits: Callable[[int], Report | None], start: int) -> Report | None:
    """The report of the largest batch size that fits: doubled from `start` on, then closed in on by halves.

    Sizes beyond 16 are tried in steps of an eighth, since each takes a compilation.
    """
    size, best, too_large = start, None, None
    while (report := fits(size)) is not None:
        best, size = report, size * 2
    too_large = size
    low = 0 if best is None else too_large // 2
    while too_large - low > max(1, low // 8):
        middle = (low + too_large) // 2
        report = fits(middle)
        if report is None:
            too_large = middle
        else:
            best, low = report, middle
    return best
