"""Reports that are made in a process of their own, with stand-ins for the compiler that do what it may do."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from flax_trainer.base_models import ModelConfigs
from flax_trainer.compile_report.costs import Costs
from flax_trainer.compile_report.in_subprocess import CompilerCrashedError, in_subprocess
from flax_trainer.compile_report.report import DoesNotFitError, Memory, Report
from flax_trainer.compile_report.targets import Target, parse_target
from flax_trainer.random_model import ARCHITECTURES
from shared.config import TrainConfig
from shared.diffusion.schedule import NoiseSchedule
from tests.end_to_end.support.running import PROJECT

TARGET = parse_target("v4-8")


def estimates(config: TrainConfig, _: ModelConfigs, __: NoiseSchedule, target: Target, *, from_cache: bool) -> Report:
    memory, costs = Memory(1, 2, 3, 4, 5, 6), Costs({"unet": 1.0}, {"copies": 1.0}, 1e8, 0, 0, 0, 0)
    return Report(target, config, from_cache, 2, 8, memory, costs, 1e12, 1e9, 1e12, os.getpid())


def crashes(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def refuses(*_: object, **__: object) -> None:
    raise DoesNotFitError("Ran out of memory in memory space hbm.")


def report_of(compiler: Callable[..., Any]) -> Report:
    parts = ARCHITECTURES["tiny"]
    configs = ModelConfigs.of(parts.unet, parts.vae, parts.text_encoder, parts.text_encoder_2)
    schedule = NoiseSchedule.from_config(parts.scheduler)
    config = TrainConfig(train_batch_size=3)
    report: Report = in_subprocess(compiler, config, configs, schedule, TARGET, from_cache=True)
    return report


def test_the_report_comes_back() -> None:
    report = report_of(estimates)
    assert report.compile_seconds != os.getpid()
    assert (report.target, report.config.train_batch_size, report.from_cache) == (TARGET, 3, True)
    assert report.as_json()["cycles_by_part"] == {"unet": 1.0}


def test_what_does_not_fit_is_told_apart_from_a_crash() -> None:
    with pytest.raises(DoesNotFitError, match="Ran out of memory in memory space hbm"):
        report_of(refuses)
    with pytest.raises(CompilerCrashedError, match="another --train_batch_size, or more memory"):
        report_of(crashes)


def test_ctrl_c_need_not_wait_for_the_compiler() -> None:
    """Which compiles this for ten minutes and more."""
    model = ["--model", "sd15", "--resolution", "64", "--train_batch_size", "1"]
    started = subprocess.Popen(
        [sys.executable, "-m", "flax_trainer.compile_report", "--target", "v4-8", *model],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline().startswith("The model is made for --resolution 512")
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 130
    assert errors.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in errors
