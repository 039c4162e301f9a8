"""One training, twice: every figure and picture of the PyTorch run is that of the Flax run, within the tolerances.

The run has what could tell the backends apart: weighted timesteps, accumulated slices, dropped captions, AdamW's
moments, a changing learning rate, clipped gradients, validation pictures and figures on held-out samples.
"""

from pathlib import Path

import numpy as np
import pytest

from shared.checkpoints.portable import CONTROLNET_FOLDER
from tests.end_to_end.support.comparing import distance, picture, relative, trained_weights
from tests.end_to_end.support.running import metrics
from tests.end_to_end.support.tiny_runs import BATCH, FLAX_HERE, PROMPT, SIZE, TORCH, begin_from

STEPS, HALF_WAY = 8, 4


@pytest.fixture(scope="module")
def command(base_model: Path, condition: Path) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(base_model), "--resolution", str(SIZE)),
        *("--generated_circles", "40", "--num_evaluation_samples", "4"),
        *(
            "--gradient_accumulation_steps",
            "2",
            "--max_train_steps",
            str(STEPS),
            "--checkpointing_steps",
            str(HALF_WAY),
        ),
        *("--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2", "--max_grad_norm", "0.2"),
        *("--snr_gamma", "5", "--proportion_empty_prompts", "0.3"),
        *("--validation_image", str(condition), "--validation_prompt", PROMPT, "--num_validation_images", "3"),
        *("--validation_steps", str(STEPS), "--guidance_scale", "3"),
    ]


@pytest.fixture(scope="module")
def runs(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The finished run of each backend, and under `a to b` the run that b finished from a's half-way checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    backends = {backend.name: backend for backend in (FLAX_HERE, TORCH)}

    def train(name: str, output_dir: Path, *more: str) -> None:
        backend = backends[name]
        backend.train([*command, "--train_batch_size", BATCH // backend.devices, "--output_dir", output_dir, *more])

    for name in backends:
        train(name, folder / name)
    for first, second in (("flax", "torch"), ("torch", "flax")):
        output_dir = folder / f"{first} to {second}"
        begin_from(folder / first, HALF_WAY, output_dir)
        train(second, output_dir, "--resume_from_checkpoint", "latest")
    return {path.name: path for path in folder.iterdir()}


ALIKE = ("torch", "flax to torch", "torch to flax")


@pytest.fixture(params=ALIKE)
def pair(request: pytest.FixtureRequest, runs: dict[str, Path]) -> tuple[Path, Path]:
    """The Flax run, and another that has to be like it."""
    return runs["flax"], runs[request.param]


def test_losses_and_gradient_norms_are_the_same(pair: tuple[Path, Path]) -> None:
    expected, given = ([entry for entry in metrics(run) if entry["step"] > 0] for run in pair)
    assert [entry["step"] for entry in given] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "learning_rate", "epoch"):
        difference = relative([entry[name] for entry in given], [entry[name] for entry in expected])
        assert max(difference) < 1e-3, (name, difference)


def test_the_floating_point_operations_of_an_image_are_the_same(runs: dict[str, Path]) -> None:
    in_flax, in_torch = (
        entry["model_tflops_per_second"] * backend.devices / entry["images_per_second"]
        for backend in (FLAX_HERE, TORCH)
        for entry in metrics(runs[backend.name])[-1:]
    )
    assert in_torch == pytest.approx(in_flax, rel=1e-6)


def test_held_out_losses_are_the_same(pair: tuple[Path, Path]) -> None:
    expected, given = ([entry for entry in metrics(run) if "validation_loss" in entry] for run in pair)
    assert [entry["step"] for entry in given] == [0, STEPS]
    for before, after in zip(expected, given, strict=True):
        names = [name for name in before if name.startswith("validation_loss")]
        assert max(relative([after[name] for name in names], [before[name] for name in names])) < 1e-3


def test_trained_weights_are_the_same(runs: dict[str, Path], pair: tuple[Path, Path]) -> None:
    expected, given = (trained_weights(run) for run in pair)
    assert given.keys() == expected.keys()
    assert distance(given, expected) < 1e-3
    # What was learnt agrees too, not only what training started from.
    start = trained_weights(runs["torch"] / f"checkpoint-{HALF_WAY}" / CONTROLNET_FOLDER)
    assert distance(given, expected) < 0.05 * distance(given, start)


def test_pictures_are_the_same(pair: tuple[Path, Path]) -> None:
    expected, given = (picture(run / "validation" / f"step-{STEPS}" / "0.png") for run in pair)
    assert np.abs(given - expected).mean() < 3
    assert given.std() > 20  # a picture, not a blank
