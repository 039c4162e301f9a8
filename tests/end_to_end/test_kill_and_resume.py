"""A run that is killed or stopped again and again, at any moment, and each time started anew with the same command.

KILL_ROUNDS in the environment is the number of kills, STOP_ROUNDS that of SIGTERMs, KILL_SEED chooses their moments.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.checkpoints.policy import checkpoint_step, checkpoints_in, is_checkpoint
from shared.checkpoints.portable import CONTROLNET_FOLDER, read_optimizer_state, read_training_state
from tests.end_to_end.support.comparing import trained_weights
from tests.end_to_end.support.running import logged_steps, losses, metrics, untimed_metrics, wait_until
from tests.end_to_end.support.tiny_runs import FLAX_HERE, FLAX_MESH_HERE, SIZE, TORCH, Backend
from torch_trainer.checkpoints.flax_checkpoint import is_flax_checkpoint, read_flax_checkpoint
from torch_trainer.checkpoints.safetensors_checkpoints import checkpoint_record_of

KILL_ROUNDS, STOP_ROUNDS = int(os.environ.get("KILL_ROUNDS", 1)), int(os.environ.get("STOP_ROUNDS", 1))
SEED = int(os.environ.get("KILL_SEED", 0))
STEPS_PER_ROUND = 4
CHECKPOINTING_STEPS, VALIDATION_STEPS, KEEP, BATCH = 2, 4, 2, 8


def command(backend: Backend, base_model: Path, output_dir: Path, steps: int) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(base_model), "--resolution", str(SIZE)),
        *("--generated_circles", "24", "--num_evaluation_samples", "2"),
        *("--train_batch_size", str(BATCH // backend.devices)),
        *("--max_train_steps", str(steps), "--learning_rate", "1e-3", "--lr_scheduler", "linear"),
        *("--checkpointing_steps", str(CHECKPOINTING_STEPS), "--checkpoints_total_limit", str(KEEP)),
        *("--validation_steps", str(VALIDATION_STEPS), "--lr_warmup_steps", "3"),
        *("--output_dir", str(output_dir), "--resume_from_checkpoint", "latest"),
    ]


@pytest.mark.parametrize("backend", [FLAX_HERE, FLAX_MESH_HERE, TORCH], ids=lambda backend: backend.name)
def test_what_is_left_is_what_an_uninterrupted_run_leaves(backend: Backend, base_model: Path, tmp_path: Path) -> None:
    signals = [signal.SIGKILL] * KILL_ROUNDS + [signal.SIGTERM] * STOP_ROUNDS
    steps = STEPS_PER_ROUND * (len(signals) + 1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    backend.train(command(backend, base_model, whole, steps))
    moments = random.Random(SEED)
    moments.shuffle(signals)
    for number in signals:
        process = backend.start(command(backend, base_model, parts, steps))
        moment = wait_for_a_random_moment(process, parts, moments)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        left = ", ".join(path.name for path in checkpoints_in(parts))
        print(f"seed {SEED}, {number.name} after {moment}: {logged_steps(parts)} lines, {left}")
        assert process.returncode in (0, -number), output
        assert_checkpoints_are_whole(parts)
        if number == signal.SIGTERM:
            assert process.returncode == 0, output
            assert "--resume_from_checkpoint latest" in output
            assert checkpoint_step(checkpoints_in(parts)[-1]) == metrics(parts)[-1]["step"]
    backend.train(command(backend, base_model, parts, steps))

    assert [entry["step"] for entry in untimed_metrics(parts)] == list(range(steps + 1))
    assert untimed_metrics(parts) == untimed_metrics(whole)
    assert [path.name for path in checkpoints_in(parts)] == [path.name for path in checkpoints_in(whole)]
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}
    for name, value in trained_weights(whole).items():
        np.testing.assert_array_equal(trained_weights(parts)[name], value, err_msg=name)
    # TensorBoard's writer works in the background and may lose the seconds before a kill; nothing comes twice.
    events = EventAccumulator(str(parts / "logs" / "train_controlnet"), size_guidance={"scalars": 0}).Reload()
    shown = [event.step for event in events.Scalars("loss")]
    assert sorted(set(shown)) == shown
    assert shown[-1] == steps
    expected = [losses(whole)[step - 1] for step in shown]
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], expected, rtol=1e-6)


def wait_for_a_random_moment(process: subprocess.Popen[str], run: Path, moments: random.Random) -> str:
    """Between any two steps, while a checkpoint is written, or just as it is complete; or the end of the run."""
    moment = moments.choice(["a step", "a checkpoint begun", "a checkpoint complete"])
    count, seconds = moments.randint(1, STEPS_PER_ROUND), moments.choice([0, moments.uniform(0, 0.05)])
    before = last_change(run)
    wait_until(lambda: last_change(run) != before, process)
    lines, folders = logged_steps(run), set(run.glob("checkpoint-*"))

    def has_come() -> bool:
        if moment == "a step":
            return logged_steps(run) >= lines + count
        new = [path for path in set(run.glob("checkpoint-*")) - folders if "deleted" not in path.name]
        return any(is_checkpoint(path) == (moment == "a checkpoint complete") for path in new)

    while process.poll() is None and not has_come():
        time.sleep(0.0005)
    time.sleep(seconds)
    return f"{moment} + {seconds:.3f} s"


def last_change(run: Path) -> int | None:
    """When the log was last written to, in nanoseconds."""
    file = run / "metrics.jsonl"
    return file.stat().st_mtime_ns if file.exists() else None


def assert_checkpoints_are_whole(run: Path) -> None:
    """What bears the name of a checkpoint can be resumed from."""
    for checkpoint in checkpoints_in(run):
        if is_flax_checkpoint(checkpoint):
            step, params, moments, *_ = read_flax_checkpoint(checkpoint)
        else:
            step, params = read_training_state(checkpoint)["step"], trained_weights(checkpoint / CONTROLNET_FOLDER)
            moments = {name for _, name, _ in read_optimizer_state(checkpoint)}
        assert step == checkpoint_step(checkpoint)
        assert params.keys() == set(moments)
        assert checkpoint_record_of(checkpoint)["global_batch_size"] == BATCH
