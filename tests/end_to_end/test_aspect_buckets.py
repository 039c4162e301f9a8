"""Pictures of three shapes in one training: both backends take the same batches, and compile a step for each shape."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from shared.run.log import RunLog, StepFigures
from tests.end_to_end.support.comparing import trained_weights
from tests.end_to_end.support.running import losses, metrics, train_torch_here, untimed_metrics
from tests.end_to_end.support.tiny_runs import BATCH, FLAX_HERE, SIZE, begin_from
from tests.shared.data.pictures import png, write_image_folder

STEPS, HALF_WAY = 6, 3
PICTURES = [(60, 100), (70, 70), (100, 60)] * 8
COUNTS = {"48x80": 8, "64x64": 8, "80x48": 8}
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def command(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    samples = [
        {"image": png(index, *size), "conditioning_image": png(100 + index, *size), "text": f"picture {index}"}
        for index, size in enumerate(PICTURES)
    ]
    data = write_image_folder(tmp_path_factory.mktemp("data"), samples)
    return [
        *("--pretrained_model_name_or_path", str(base_model), "--train_data_dir", str(data)),
        *("--resolution", str(SIZE), "--aspect_buckets", "3", "--random_flip", "--random_crop"),
        *("--max_train_steps", str(STEPS), "--checkpointing_steps", str(HALF_WAY)),
        *("--learning_rate", "1e-3", "--lr_scheduler", "constant"),
    ]


def in_torch(command: list[str], output_dir: Path, *more: str) -> list[str]:
    return [*command, "--train_batch_size", str(BATCH), "--output_dir", str(output_dir), *more]


@pytest.fixture(scope="module")
def in_flax(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """A run on eight devices, what it said, and in their order its compilations and the sizes of its steps."""
    events: list[str] = []
    add, output_dir = RunLog.add, tmp_path_factory.mktemp("runs") / "flax"

    def watch(event: str, _: float, **__: Any) -> None:
        if event == COMPILED:
            events.append(COMPILED)

    def added(log: RunLog, figures: StepFigures, *rest: Any, **more: Any) -> None:
        events.append("{}x{}".format(*figures.size))
        add(log, figures, *rest, **more)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(RunLog, "add", added)
        jax.monitoring.register_event_duration_secs_listener(watch)
        batch = ["--train_batch_size", str(BATCH // FLAX_HERE.devices)]
        output = FLAX_HERE.train([*command, *batch, "--output_dir", str(output_dir)])
        jax.monitoring.unregister_event_duration_listener(watch)
    return output_dir, output, events


@pytest.fixture(scope="module")
def torch_run(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("runs") / "torch"
    train_torch_here(in_torch(command, output_dir))
    return output_dir


def test_both_backends_train_the_same(in_flax: tuple[Path, str, list[str]], torch_run: Path) -> None:
    flax_run, _, _ = in_flax
    np.testing.assert_allclose(losses(torch_run), losses(flax_run), rtol=1e-5)
    expected, given = map(trained_weights, (flax_run, torch_run))
    for name, value in expected.items():
        np.testing.assert_allclose(given[name], value, atol=2e-4, err_msg=name)


def test_flax_compiles_each_shape_before_the_first_step_and_none_later(in_flax: tuple[Path, str, list[str]]) -> None:
    _, output, events = in_flax
    before, begun, _ = output.partition("The first step is done")
    assert begun
    for size in COUNTS:
        assert before.count(f"The training step is compiled for pictures of {size}") == 1
    assert COMPILED in events
    steps = [place for place, event in enumerate(events) if event != COMPILED]
    assert COMPILED not in events[steps[0] : steps[-1]]
    assert Counter(events[place] for place in steps) == dict.fromkeys(COUNTS, 2), "each shape fills a batch an epoch"


def test_the_log_and_the_report_tell_of_shapes(in_flax: tuple[Path, str, list[str]], torch_run: Path) -> None:
    flax_run, output, _ = in_flax
    assert "3: 48x80 (8 examples), 64x64 (8 examples), 80x48 (8 examples)" in output
    for run in (flax_run, torch_run):
        assert json.loads((run / "report.json").read_text())["aspect_buckets"] == COUNTS


def test_the_operations_of_an_image_are_those_of_its_shape(
    in_flax: tuple[Path, str, list[str]], torch_run: Path
) -> None:
    """Both backends count the same steps for a speed, so the same shapes."""
    of_flax, of_torch = (
        [entry["model_tflops_per_second"] / entry["images_per_second"] for entry in metrics(run)]
        for run in (in_flax[0], torch_run)
    )
    assert np.array(of_flax) * FLAX_HERE.devices == pytest.approx(of_torch, rel=1e-6)
    assert len({round(flops, 9) for flops in of_torch}) > 1


def test_a_run_goes_on_bit_for_bit_and_with_the_other_backend(
    command: list[str], in_flax: tuple[Path, str, list[str]], torch_run: Path, tmp_path: Path
) -> None:
    for name, run in (("own", torch_run), ("other", in_flax[0])):
        begin_from(run, HALF_WAY, tmp_path / name)
        train_torch_here(in_torch(command, tmp_path / name, "--resume_from_checkpoint", "latest"))
    assert untimed_metrics(tmp_path / "own") == untimed_metrics(torch_run)
    np.testing.assert_allclose(losses(tmp_path / "other"), losses(in_flax[0]), rtol=1e-5)
