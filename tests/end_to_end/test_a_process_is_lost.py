"""One of two processes meets data that it cannot use, then one is killed: neither costs more than the steps since a
checkpoint, and what comes of it all is what an undisturbed run leaves."""

from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import pytest

from shared.checkpoints.policy import checkpoints_in
from shared.data.candidates import ShuffledCandidates
from shared.run.lost_process import LOST_PROCESS
from tests.end_to_end.support.comparing import trained_weights
from tests.end_to_end.support.running import (
    Arguments,
    finish,
    logged_steps,
    metrics,
    start_flax_processes,
    start_torch_processes,
    untimed_metrics,
    wait_until,
)
from tests.end_to_end.support.tiny_runs import SIZE
from tests.shared.data.pictures import pairs, write_prompt_json

SAMPLES, BATCH, STEPS, SPOILED_STEP, SEED = 24, 8, 20, 2, 7
RESUME = ["--resume_from_checkpoint", "latest"]


def start_flax(arguments: Arguments) -> list[Popen[str]]:
    return start_flax_processes(arguments, devices=1)


def command(base_model: Path, data: Path, output_dir: Path, *more: object) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(base_model), "--resolution", str(SIZE), "--seed", str(SEED)),
        *("--train_data_dir", str(data), "--max_skipped_samples", "0", "--train_batch_size", str(BATCH // 2)),
        *("--max_train_steps", str(STEPS), "--checkpointing_steps", "10", "--validation_steps", str(STEPS)),
        *("--report_to", "none", "--output_dir", str(output_dir)),
        *map(str, more),
    ]


@pytest.mark.parametrize("start", [start_flax, start_torch_processes], ids=["flax", "torch"])
def test_neither_bad_data_nor_a_kill_costs_more_than_the_steps_since_a_checkpoint(
    start: Callable[[Arguments], list[Popen[str]]], base_model: Path, tmp_path: Path
) -> None:
    data, whole, parts = write_prompt_json(tmp_path / "data", pairs(SAMPLES)), tmp_path / "whole", tmp_path / "parts"
    for process in start(command(base_model, data, whole, "--checkpointing_seconds", 0.2)):
        finish(process)
    assert [path.name for path in checkpoints_in(whole)] == ["checkpoint-10", f"checkpoint-{STEPS}"]

    picture = data / "image" / f"{sample_of(process=1, step=SPOILED_STEP):04d}.png"
    good = picture.read_bytes()
    picture.write_bytes(bytes(len(good)))
    processes = start(command(base_model, data, parts))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert f"error: Another process of this run met data that it cannot use in step {SPOILED_STEP}" in outputs[0]
    assert "--max_skipped_samples" in outputs[1]
    assert [path.name for path in checkpoints_in(parts)] == [f"checkpoint-{SPOILED_STEP - 1}"]
    assert metrics(parts)[-1]["step"] == SPOILED_STEP - 1

    picture.write_bytes(good)
    processes = start(command(base_model, data, parts, *RESUME))
    wait_until(lambda: logged_steps(parts) > SPOILED_STEP, processes[0])
    processes[1].kill()
    outputs = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [LOST_PROCESS, -9], outputs
    told = "was lost, and this one cannot go on without it"
    assert told in outputs[0]
    assert "This process of the run was killed" in outputs[1]
    for output in outputs:
        assert f"it goes on from checkpoint-{SPOILED_STEP - 1}." in output
        assert "Traceback" not in output

    for process in start(command(base_model, data, parts, *RESUME)):
        finish(process)
    assert untimed_metrics(parts) == untimed_metrics(whole)
    for name, value in trained_weights(whole).items():
        np.testing.assert_array_equal(trained_weights(parts)[name], value, err_msg=name)


def sample_of(process: int, step: int) -> int:
    """The first that a process of two uses in a step."""
    samples: Any = range(SAMPLES)
    return int(next(ShuffledCandidates(samples, SEED).at((step - 1) * BATCH + process * BATCH // 2)))
