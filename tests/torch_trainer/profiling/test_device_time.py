"""Seconds by part and by kind, as the benchmark of GPUs asks for them."""

import gzip
import json
from pathlib import Path

import pytest

from shared.profiling.device_time import OUTSIDE
from shared.profiling.kinds import KINDS
from shared.profiling.parts import PARTS, backward
from tests.torch_trainer.profiling.cuda_trace import a_step
from torch_trainer.profiling.device_time import device_time
from torch_trainer.profiling.kineto import read_trace


def test_a_gpu_works_as_long_as_its_kernels() -> None:
    time = device_time(read_trace(a_step()))
    assert time.by_part == pytest.approx(
        {
            "unet backward": 66e-6,
            "controlnet backward": 47e-6,
            "unet": 40e-6,
            "controlnet": 20e-6,
            "vae": 14e-6,
            "optimizer": 13e-6,
            OUTSIDE: 6e-6,
        }
    )
    assert time.by_kind["attention"] == pytest.approx(60e-6)
    assert time.total == pytest.approx(sum(time.by_part.values())) == pytest.approx(sum(time.by_kind.values()))
    assert list(time.by_part.values()) == sorted(time.by_part.values(), reverse=True)


def test_names_are_those_that_are_documented() -> None:
    time = device_time(read_trace(a_step()))
    assert time.by_kind.keys() <= set(KINDS)
    assert time.by_part.keys() <= {*PARTS, *map(backward, PARTS), OUTSIDE}


def test_times_are_of_one_step_and_files_may_be_compressed(tmp_path: Path) -> None:
    file = tmp_path / "trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps(a_step()).encode()))
    assert device_time(read_trace(file), steps=2).total == pytest.approx(device_time(read_trace(a_step())).total / 2)


def test_a_trace_without_anything_in_it() -> None:
    time = device_time(read_trace({"traceEvents": []}))
    assert (time.by_part, time.by_kind, time.total) == ({}, {}, 0)
