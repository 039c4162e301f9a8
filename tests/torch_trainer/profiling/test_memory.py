"""Snapshots of a GPU's memory, which a machine without one refuses before it begins."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import TrainConfig
from tests.end_to_end.support.running import main_of_train_torch
from torch_trainer.profiling.memory import remember_allocations, write_memory

CONFIG = TrainConfig(profile_memory=True)
GPU = torch.device("cuda", 0)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What PyTorch, which here has no GPU, is asked to remember."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **settings: told.append(settings))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    return told


def test_a_run_without_a_gpu_is_refused_before_any_work(
    base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--pretrained_model_name_or_path", base_model, "--generated_circles", 8, "--output_dir", run]
    assert main_of_train_torch([*flags, "--profile_memory"]) == 2
    message = capsys.readouterr().err
    for part in ("--profile_memory is given", "this run is on cpu", "needs an NVIDIA or AMD GPU", "Leave the flag out"):
        assert part in message
    assert not run.exists()


def test_without_the_flag_nothing_is_remembered_or_written(tmp_path: Path, told: list[dict[str, Any]]) -> None:
    config = replace(CONFIG, profile_memory=False, output_dir=str(tmp_path))
    for device in (GPU, torch.device("cpu")):
        remember_allocations(config, device)
    write_memory(config, "initial")
    assert told == []
    assert list(tmp_path.iterdir()) == []


def test_snapshots_have_the_stacks_of_what_is_there(
    tmp_path: Path, told: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, output_dir=str(tmp_path))
    remember_allocations(config, GPU)
    assert told == [{"enabled": "state", "context": "state", "stacks": "python"}]
    with caplog.at_level(logging.INFO):
        for moment in ("initial", "final"):
            write_memory(config, moment)
    assert {path.name for path in tmp_path.iterdir()} == {"memory_initial.pickle", "memory_final.pickle"}
    assert "https://pytorch.org/memory_viz" in caplog.text


def test_a_snapshot_that_cannot_be_written_is_only_missing(
    tmp_path: Path, told: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    write_memory(replace(CONFIG, output_dir=str(tmp_path / "nowhere")), "final")
    assert "A profile of device memory cannot be written" in caplog.text
