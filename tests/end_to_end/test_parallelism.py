"""Both engines of the Flax backend, on one device and many, in one process and in two, train the same."""

import signal
from pathlib import Path

import numpy as np
import pytest

from shared.checkpoints.policy import checkpoint_step
from tests.end_to_end.support.comparing import distance, relative, trained_weights
from tests.end_to_end.support.full_disk import assert_a_checkpoint_without_room_ends_the_run
from tests.end_to_end.support.running import (
    finish,
    logged_steps,
    losses,
    metrics,
    start_flax_processes,
    train_flax,
    train_flax_here,
    untimed_metrics,
    wait_until,
)
from tests.end_to_end.support.tiny_runs import BATCH, arguments, begin_from
from torch_trainer.checkpoints.flax_checkpoint import read_flax_checkpoint
from train_flax import main as main_of_train_flax

STEPS, HALF_WAY, CHECKPOINTING_STEPS = 12, 6, 3
ENGINES: dict[str, list[object]] = {
    "pmap": [],
    "mesh 8x1": ["--parallelism", "mesh"],
    "mesh 4x2": ["--parallelism", "mesh", "--fsdp_devices", 2],
    "mesh 1x8": ["--parallelism", "mesh", "--fsdp_devices", 8],
}
ON_EIGHT = ["--train_batch_size", BATCH // 8]
ON_TWO_BY_TWO = ["--train_batch_size", BATCH // 4]
HELD_OUT = ["--num_evaluation_samples", 3]
RESUME = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallelism")


def command(base_model: Path, output_dir: Path, *more: object) -> list[str]:
    steps = ["--max_train_steps", STEPS, "--checkpointing_steps", CHECKPOINTING_STEPS, "--validation_steps", STEPS]
    # A small step, for AdamW makes rounding errors of tiny gradients as large as that.
    course = [*steps, "--learning_rate", 1e-4, "--report_to", "none", *HELD_OUT]
    return arguments(base_model, output_dir, *course, *more)


@pytest.fixture(scope="module")
def one(base_model: Path, folder: Path) -> Path:
    """The run on a single device."""
    train_flax(command(base_model, folder / "one"))
    return folder / "one"


@pytest.fixture(scope="module")
def eight(base_model: Path, folder: Path) -> dict[str, Path]:
    """The same global batches on eight devices, under each engine's name."""
    for name, engine in ENGINES.items():
        train_flax_here(command(base_model, folder / name, *ON_EIGHT, *engine))
    return {name: folder / name for name in ENGINES}


@pytest.fixture(scope="module")
def two(base_model: Path, folder: Path) -> dict[str, Path]:
    """The same in two processes with two devices each; on the mesh, with captions that each encodes beforehand."""
    runs = {}
    mesh = ["--parallelism", "mesh", "--fsdp_devices", 4, "--precompute_text", "--cache_dir", folder / "cache"]
    for name, more in {"pmap": [], "mesh 1x4": mesh}.items():
        runs[name] = folder / f"two processes, {name}"
        processes = start_flax_processes(command(base_model, runs[name], *ON_TWO_BY_TWO, *more), devices=2)
        for number, process in enumerate(processes):
            (folder / f"{runs[name].name}, output {number}").write_text(finish(process))
    return runs


def assert_same_course(run: Path, one: Path) -> None:
    """Every loss, those on held-out samples, and the ControlNet that comes of it."""
    assert [entry["step"] for entry in metrics(run)] == list(range(STEPS + 1))
    assert max(relative(losses(run), losses(one))) < 1e-5
    for step in (0, STEPS):
        names = [name for name in metrics(one)[step] if name.startswith("validation_loss")]
        given, expected = ([metrics(run)[step][name] for name in names] for run in (run, one))
        assert max(relative(given, expected)) < 1e-5
    assert distance(trained_weights(run), trained_weights(one)) < 1e-5


@pytest.mark.parametrize("name", ENGINES)
def test_eight_devices_train_like_one(name: str, eight: dict[str, Path], one: Path) -> None:
    assert_same_course(eight[name], one)


@pytest.mark.parametrize("name", ["pmap", "mesh 1x4"])
def test_two_processes_train_like_one(name: str, two: dict[str, Path], one: Path) -> None:
    assert_same_course(two[name], one)


def test_only_one_of_two_processes_writes(two: dict[str, Path], one: Path) -> None:
    run = two["mesh 1x4"]
    first, second = (run.with_name(f"{run.name}, output {number}").read_text() for number in range(2))
    assert "8 images per step = 2 per device × 4 devices × 1 accumulated" in first
    for words in ("Training a ControlNet with JAX", "Steps:", "The ControlNet is in"):
        assert words in first
        assert words not in second
    assert {path.name for path in run.iterdir()} == {path.name for path in one.iterdir()}
    assert "coordinator_address: null" in (run / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("before", "after"),
    [("two processes, pmap", "mesh 4x2"), ("two processes, mesh 1x4", "pmap"), ("mesh 4x2", "pmap")],
)
@pytest.mark.usefixtures("eight", "two")
def test_a_run_goes_on_with_another_engine(
    before: str, after: str, folder: Path, one: Path, base_model: Path, tmp_path: Path
) -> None:
    begin_from(folder / before, HALF_WAY, tmp_path / "run")
    train_flax_here(command(base_model, tmp_path / "run", *ON_EIGHT, *ENGINES[after], *RESUME))
    assert_same_course(tmp_path / "run", one)


def test_a_run_goes_on_bit_for_bit_with_its_own_engine_from_what_a_full_disk_left(
    eight: dict[str, Path], base_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, part = eight["mesh 4x2"], tmp_path / "run"
    begin_from(run, CHECKPOINTING_STEPS, part)
    resume = command(base_model, part, *ON_EIGHT, *ENGINES["mesh 4x2"], *RESUME)
    assert_a_checkpoint_without_room_ends_the_run(main_of_train_flax, resume, part, capfd)
    train_flax_here(resume)
    assert untimed_metrics(part) == untimed_metrics(run)
    for name, value in trained_weights(run).items():
        np.testing.assert_array_equal(trained_weights(part)[name], value, err_msg=name)


@pytest.mark.parametrize("name", ["mesh 4x2", "mesh 1x8", "two processes, pmap", "two processes, mesh 1x4"])
@pytest.mark.usefixtures("eight", "two")
def test_the_other_backend_reads_divided_checkpoints(name: str, folder: Path) -> None:
    """What it finds in the last one is the finished ControlNet."""
    saved = read_flax_checkpoint(folder / name / f"checkpoint-{STEPS}")
    expected = trained_weights(folder / name)
    assert saved.step == STEPS
    assert saved.params.keys() == expected.keys() == saved.optimizer.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(saved.params[key], value, err_msg=key)
        assert {kind: array.shape for kind, array in saved.optimizer[key].items()} == {
            "exp_avg": value.shape,
            "exp_avg_sq": value.shape,
        }


def test_sigterm_to_one_of_two_processes_stops_both_with_one_checkpoint(
    base_model: Path, one: Path, tmp_path: Path
) -> None:
    """As when a machine of several is taken away. The one that is told is not the one that writes."""
    endless = ["--max_train_steps", 100000, "--checkpointing_steps", 10**6, "--validation_steps", 10**6]
    mesh = ["--parallelism", "mesh", "--fsdp_devices", 4]
    processes = start_flax_processes(command(base_model, tmp_path, *ON_TWO_BY_TWO, *mesh, *endless), devices=2)
    wait_until(lambda: logged_steps(tmp_path) >= 4, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [finish(process) for process in processes]
    assert "Stopped by another process; continue with --resume_from_checkpoint latest" in outputs[0]
    (saved,) = tmp_path.glob("checkpoint-*")
    step = checkpoint_step(saved)
    assert metrics(tmp_path)[-1]["step"] == step == read_flax_checkpoint(saved).step
    known = min(step, STEPS)
    assert max(relative(losses(tmp_path)[:known], losses(one)[:known])) < 1e-5


def test_processes_with_different_commands_are_refused(base_model: Path, tmp_path: Path) -> None:
    processes = start_flax_processes(
        command(base_model, tmp_path, *ON_TWO_BY_TWO), devices=2, more=[["--seed", 1], ["--seed", 2]]
    )
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert "another command than process 0: --seed (2, not 1)" in outputs[1]
    assert "Another process of this run cannot start" in outputs[0]
