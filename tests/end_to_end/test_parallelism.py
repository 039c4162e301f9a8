"""Both engines of the Flax backend, on one device and many, in one process and in two, train the same."""

import re
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.comparing import distance, picture, relative, trained_weights
from tests.end_to_end.running import (
    finish,
    logged_steps,
    losses,
    metrics,
    start_flax_processes,
    train_flax,
    untimed_metrics,
    wait_until,
)
from tests.end_to_end.tiny_runs import BATCH, PROMPT, arguments, begin_from
from torch_trainer.flax_checkpoint import read_flax_checkpoint

STEPS, HALF_WAY = 20, 10
# Programs for tests that compile in seconds: how well they are optimised is no matter here, but the same for all.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
RESUME = ["--resume_from_checkpoint", "latest"]
ENGINES = {
    "pmap": ["--parallelism", "pmap"],
    "mesh 8x1": ["--parallelism", "mesh"],
    "mesh 4x2": ["--parallelism", "mesh", "--fsdp_devices", 2],
    "mesh 1x8": ["--parallelism", "mesh", "--fsdp_devices", 8],
}
TOGETHER = {"two processes, pmap": ENGINES["pmap"], "two processes, mesh 2x2": ENGINES["mesh 4x2"]}


def command(base_model: Path, output_dir: Path, *more: object) -> list[str]:
    steps = ["--max_train_steps", STEPS, "--checkpointing_steps", HALF_WAY, "--validation_steps", STEPS]
    # A small step, for AdamW makes rounding errors of tiny gradients as large as that.
    return arguments(base_model, output_dir, *steps, "--learning_rate", 1e-4, "--report_to", "none", *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallelism")


@pytest.fixture(scope="module")
def measured(condition: Path) -> list[object]:
    """What processes work on together beside the steps: figures and pictures, of numbers that nothing divides."""
    return [
        *("--num_evaluation_samples", 3, "--evaluation_fidelity", "circles"),
        *("--validation_image", condition, "--validation_prompt", PROMPT, "--num_validation_images", 5),
    ]


@pytest.fixture(scope="module")
def one(base_model: Path, folder: Path, measured: list[object]) -> Path:
    """The run on a single device."""
    train_flax(command(base_model, folder / "one", *measured), **QUICK)
    return folder / "one"


@pytest.fixture(scope="module", params=ENGINES)
def eight(request: pytest.FixtureRequest, base_model: Path, folder: Path) -> Path:
    """The same global batches on eight devices."""
    run = folder / request.param
    more = ["--num_evaluation_samples", 3, "--train_batch_size", BATCH // 8, *ENGINES[request.param]]
    train_flax(command(base_model, run, *more), devices=8, **QUICK)
    return run


@pytest.fixture(scope="module", params=TOGETHER)
def two(request: pytest.FixtureRequest, base_model: Path, folder: Path, measured: list[object]) -> Path:
    """The same in two processes with two devices each, two accumulated slices."""
    run = folder / request.param
    share = ["--train_batch_size", 1, "--gradient_accumulation_steps", BATCH // 4]
    processes = start_flax_processes(
        command(base_model, run, *measured, *share, *TOGETHER[request.param]), devices=2, **QUICK
    )
    for number, process in enumerate(processes):
        (folder / f"{request.param}, output {number}").write_text(finish(process))
    return run


def assert_same_course(run: Path, one: Path) -> None:
    assert [entry["step"] for entry in metrics(run)] == list(range(STEPS + 1))
    assert max(relative(losses(run), losses(one))) < 1e-5
    given, expected = trained_weights(run), trained_weights(one)
    assert distance(given, expected) < 1e-5


def test_eight_devices_train_like_one(eight: Path, one: Path) -> None:
    assert_same_course(eight, one)


def test_two_processes_train_like_one(two: Path, one: Path) -> None:
    assert_same_course(two, one)
    for given, expected in zip(metrics(two), metrics(one), strict=True):
        assert given.keys() == expected.keys()
        names = [name for name in expected if name.startswith("validation_loss") or name in ("epoch", "learning_rate")]
        assert max(relative([given[name] for name in names], [expected[name] for name in names])) < 1e-5
    for file in (f"validation/step-{STEPS}/0.png", f"validation/step-{STEPS}/held_out.png", "contact_sheet.png"):
        np.testing.assert_allclose(picture(two / file), picture(one / file), atol=2)


def test_only_one_of_the_processes_writes(two: Path, one: Path) -> None:
    first, second = (two.with_name(f"{two.name}, output {number}").read_text() for number in range(2))
    assert "8 images per step = 1 per device × 4 devices × 2 accumulated" in first
    assert [line for line in second.splitlines() if not line.startswith("[Gloo]")] == []
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert "coordinator_address: null" in (two / "config.yaml").read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_two_processes_goes_on_with_any_engine(
    engine: str, two: Path, base_model: Path, tmp_path: Path
) -> None:
    begin_from(two, HALF_WAY, tmp_path / "run")
    more = ["--num_evaluation_samples", 3, "--train_batch_size", BATCH // 8, *ENGINES[engine]]
    train_flax(command(base_model, tmp_path / "run", *more, *RESUME), devices=8, **QUICK)
    assert max(relative(losses(tmp_path / "run"), losses(two))) < 1e-5
    assert distance(trained_weights(tmp_path / "run"), trained_weights(two)) < 1e-5


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_goes_on_bit_for_bit_with_its_own_engine(
    name: str, folder: Path, base_model: Path, tmp_path: Path
) -> None:
    begin_from(folder / name, HALF_WAY, tmp_path / "run")
    more = ["--num_evaluation_samples", 3, "--train_batch_size", BATCH // 8, *ENGINES[name]]
    train_flax(command(base_model, tmp_path / "run", *more, *RESUME), devices=8, **QUICK)
    assert untimed_metrics(tmp_path / "run") == untimed_metrics(folder / name)
    for key, value in trained_weights(folder / name).items():
        np.testing.assert_array_equal(trained_weights(tmp_path / "run")[key], value, err_msg=key)
