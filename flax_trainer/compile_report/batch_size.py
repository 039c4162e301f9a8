"""The largest batch per chip that fits, without and with gradient checkpointing."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from flax_trainer.base_models import ModelConfigs
from flax_trainer.compile_report.report import DoesNotFitError, Report, compile_report
from flax_trainer.compile_report.targets import Target
from flax_trainer.compile_report.text import batch_size_line
from flax_trainer.models.gradient_checkpointing import CheckpointingPolicy
from shared.config import TrainConfig
from shared.diffusion.schedule import NoiseSchedule


def find_batch_size(
    config: TrainConfig,
    configs: ModelConfigs,
    schedule: NoiseSchedule,
    target: Target,
    from_cache: bool,
    json_file: Path | None,
) -> int:
    """Print what each way to save memory allows; returns the exit code, 1 where nothing fits."""
    found: dict[str, dict[str, Any] | None] = {}
    for policy in (None, *get_args(CheckpointingPolicy)):
        name = policy or "none"

        def fits(batch_size: int, policy: CheckpointingPolicy | None = policy, name: str = name) -> Report | None:
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
            print(batch_size_line(name, batch_size, report), flush=True)
            return report

        largest = search(fits, config.train_batch_size)
        found[name] = None if largest is None else largest.as_json()
    for name, figures in found.items():
        size = "nothing" if figures is None else f"--train_batch_size {figures['images_per_chip']}"
        print(f"{name}: {size} fits")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if any(found.values()) else 1


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
