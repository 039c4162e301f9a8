"""Several processes of the PyTorch backend, started by accelerate and by torchrun, train like one."""

import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest

from shared.checkpoints.portable import CONTROLNET_FOLDER
from tests.end_to_end.support.comparing import distance, picture, relative, trained_weights
from tests.end_to_end.support.running import (
    CONFIGS,
    free_port,
    launch_torch,
    logged_steps,
    losses,
    metrics,
    start_launch_torch,
    train_torch_here,
    wait_until,
)
from tests.end_to_end.support.tiny_runs import PROMPT, STEPS, arguments, begin_from

FIGURES = ("loss", "grad_norm", "learning_rate", "epoch", "validation_loss", "circle_iou")
PARTS = ["--sd_unlocked", "--only_mid_control", "--use_ema"]
SHARE = ["--train_batch_size", 2, "--gradient_accumulation_steps", 2]


@pytest.fixture(scope="module")
def more(condition: Path) -> list[object]:
    """What makes both processes work together: figures and pictures too. 3 and 5 do not divide by 2."""
    return [
        *("--num_evaluation_samples", 3, "--evaluation_fidelity", "circles", "--validation_steps", STEPS),
        *("--validation_image", condition, "--validation_prompt", PROMPT, "--num_validation_images", 5),
        # A small step, for AdamW makes rounding errors of tiny gradients as large as that.
        *("--snr_gamma", 5, "--max_grad_norm", 0.1, "--learning_rate", 1e-3),
    ]


@pytest.fixture(scope="module")
def one(base_model: Path, more: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    output_dir = tmp_path_factory.mktemp("one") / "run"
    train_torch_here(arguments(base_model, output_dir, *more))
    return output_dir


@pytest.fixture(scope="module")
def two(base_model: Path, more: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same global batches in two processes, two accumulated slices each."""
    output_dir = tmp_path_factory.mktemp("two") / "run"
    launcher = ["--multi_gpu", "--num_processes", 2, "--main_process_port", free_port()]
    output = launch_torch(launcher, arguments(base_model, output_dir, *more, *SHARE))
    (output_dir / "output.txt").write_text(output)
    return output_dir


@pytest.fixture(scope="module")
def one_with_parts(base_model: Path, more: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single process that trains the decoder too, and keeps averages."""
    output_dir = tmp_path_factory.mktemp("one with parts") / "run"
    train_torch_here(arguments(base_model, output_dir, *more, *PARTS))
    return output_dir


@pytest.fixture(scope="module")
def resumed_with_parts(
    base_model: Path, more: list[object], one_with_parts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same, begun by one process and ended by two, under plain torchrun, which share the encoding of captions."""
    folder = tmp_path_factory.mktemp("resumed")
    output_dir = folder / "run"
    begin_from(one_with_parts, 4, output_dir)
    resume = ["--resume_from_checkpoint", "latest", "--precompute_text", "--cache_dir", folder / "cache"]
    launch_torch(
        ["--nproc-per-node", 2, "--master-port", free_port()],
        arguments(base_model, output_dir, *more, *PARTS, *SHARE, *resume),
        module="torch.distributed.run",
    )
    assert len(list((folder / "cache").rglob("*.safetensors"))) == 2, "each wrote its share"
    return output_dir


@pytest.mark.parametrize(("name", "expected"), [("two", "one"), ("resumed_with_parts", "one_with_parts")])
def test_figures_and_weights_are_those_of_one_process(name: str, expected: str, request: pytest.FixtureRequest) -> None:
    run: Path = request.getfixturevalue(name)
    one: Path = request.getfixturevalue(expected)
    assert [entry.keys() for entry in metrics(run)] == [entry.keys() for entry in metrics(one)]
    for given, wanted in zip(metrics(run), metrics(one), strict=True):
        assert given["step"] == wanted["step"]
        names = [figure for figure in FIGURES if figure in wanted]
        assert max(relative([given[name] for name in names], [wanted[name] for name in names])) < 1e-5
    parts = ("", "unet") if name == "resumed_with_parts" else ("",)
    for part in parts:
        assert distance(trained_weights(run / part), trained_weights(one / part)) < 1e-5
    for file in (f"validation/step-{STEPS}/0.png", f"validation/step-{STEPS}/held_out.png", "contact_sheet.png"):
        np.testing.assert_allclose(picture(run / file), picture(one / file), atol=2)


def test_only_one_process_writes(one: Path, two: Path) -> None:
    written = (two / "output.txt").read_text()
    assert "2 × cpu (MULTI_CPU)" in written
    assert "8 images per step = 2 per device × 2 devices × 2 accumulated" in written
    for words in ("Training a ControlNet with PyTorch", "The ControlNet is in"):
        assert written.count(words) == 1
    events = [list((run / "logs").rglob("*tfevents*")) for run in (one, two)]
    assert len(events[0]) == len(events[1]) > 0
    assert {path.name for path in two.iterdir()} - {"output.txt"} == {path.name for path in one.iterdir()}


def test_sigterm_to_one_of_the_processes_stops_them_all_with_one_checkpoint(
    base_model: Path, one: Path, tmp_path: Path, more: list[object]
) -> None:
    """As when a machine of several is taken away. The one that is told is not the one that writes."""
    endless = ["--max_train_steps", 100000, "--checkpointing_steps", 10**6, "--validation_steps", 10**6]
    launcher = ["--config_file", CONFIGS / "multi_cpu.yaml", "--main_process_port", free_port()]
    process = start_launch_torch(launcher, arguments(base_model, tmp_path, *more, *SHARE, *endless))
    try:
        wait_until(lambda: logged_steps(tmp_path) >= 4, process)
        worker_of_rank(process, 1).send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "--resume_from_checkpoint latest" in output
    (saved,) = tmp_path.glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert metrics(tmp_path)[-1]["step"] == step
    known = min(step, STEPS)
    np.testing.assert_allclose(losses(tmp_path)[:known], losses(one)[:known], rtol=1e-5)
    assert (saved / CONTROLNET_FOLDER / "config.json").is_file()


def worker_of_rank(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    workers = psutil.Process(launcher.pid).children(recursive=True)
    (found,) = (worker for worker in workers if worker.environ().get("RANK") == str(rank))
    return found
