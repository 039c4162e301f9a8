"""Runs whose captions, or images too, are encoded once, before the first step, against one that does it in every step.

The base model is a Stable Diffusion XL, which is told of every photo's own size and crop.
"""

from pathlib import Path

import numpy as np
import pytest

import flax_trainer.cache_data
import flax_trainer.training.step
import torch_trainer.cache_data
from tests.end_to_end.support.comparing import picture, relative
from tests.end_to_end.support.running import losses, metrics, train_torch_here, untimed_metrics
from tests.end_to_end.support.tiny_runs import BATCH, FLAX_HERE, PROMPT, SIZE, begin_from
from tests.shared.data.pictures import pairs, write_image_folder
from torch_trainer import text_encoding
from torch_trainer.training import step

STEPS, HALF_WAY = 4, 2
PER_DEVICE = ["--train_batch_size", BATCH // FLAX_HERE.devices]


@pytest.fixture(scope="module")
def command(xl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(xl_model)),
        *("--resolution", str(SIZE), "--num_evaluation_samples", "4", "--time_ids_from_data"),
        *("--max_train_steps", str(STEPS), "--checkpointing_steps", str(HALF_WAY), "--learning_rate", "1e-3"),
        *("--proportion_empty_prompts", "0.3", "--report_to", "none"),
        *("--cache_dir", str(tmp_path_factory.mktemp("cache"))),
    ]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--train_data_dir", str(write_image_folder(tmp_path_factory.mktemp("data"), pairs()))]


@pytest.fixture(scope="module")
def in_torch_from_any_data(command: list[str], condition: Path) -> list[str]:
    return [
        *command,
        *("--train_batch_size", str(BATCH), "--num_validation_images", "1"),
        *("--validation_image", str(condition), "--validation_prompt", PROMPT),
    ]


@pytest.fixture(scope="module")
def in_torch(in_torch_from_any_data: list[str], photos: list[str]) -> list[str]:
    return [*in_torch_from_any_data, *photos]


@pytest.fixture(scope="module")
def plain(in_torch: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From pictures and captions."""
    output_dir = tmp_path_factory.mktemp("plain")
    train_torch_here([*in_torch, "--output_dir", output_dir])
    return output_dir


@pytest.fixture(scope="module")
def stored(in_torch: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("stored")
    log = train_torch_here([*in_torch, "--precompute_text", "--output_dir", output_dir])
    assert "of 22 captions and prompts" in log  # twenty samples, the empty caption, the prompt
    return output_dir


def test_figures_and_pictures_are_those_of_a_run_without(plain: Path, stored: Path) -> None:
    with_figures = [entry for entry in metrics(plain) if "validation_loss" in entry]
    assert [entry["step"] for entry in with_figures] == [0, STEPS]
    for expected, given in zip(untimed_metrics(plain), untimed_metrics(stored), strict=True):
        assert given.keys() == expected.keys()
        names = [name for name, value in expected.items() if isinstance(value, float)]
        assert max(relative([given[name] for name in names], [expected[name] for name in names])) < 1e-5
    expected, given = (picture(run / "validation" / f"step-{STEPS}" / "0.png") for run in (plain, stored))
    assert np.abs(given - expected).max() <= 1
    assert given.std() > 20  # a picture, not a blank


def test_a_run_that_began_without_goes_on_and_nothing_is_encoded_again(
    in_torch: list[str], plain: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_from(plain, HALF_WAY, tmp_path / "run")
    monkeypatch.setattr(text_encoding, "load_text_encoders", pytest.fail)
    more = ["--precompute_text", "--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "run"]
    train_torch_here([*in_torch, *more])
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(plain), rtol=1e-6)


def test_flax_trains_the_same(command: list[str], photos: list[str], plain: Path, tmp_path: Path) -> None:
    FLAX_HERE.train([*command, *photos, *PER_DEVICE, "--precompute_text", "--output_dir", tmp_path])
    assert_same_losses(tmp_path, plain)


def test_torch_trains_the_same_from_a_cache_of_flax(
    command: list[str],
    in_torch_from_any_data: list[str],
    photos: list[str],
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    make = [*command, *photos, *PER_DEVICE, "--validation_image", "any.png", "--validation_prompt", PROMPT]
    assert flax_trainer.cache_data.main([*map(str, make), "--output_dir", str(cache)]) == 0
    monkeypatch.setattr(text_encoding, "load_text_encoders", pytest.fail)
    monkeypatch.setattr(step, "encode_images", pytest.fail)
    train_torch_here([*in_torch_from_any_data, "--cached_data", cache, "--output_dir", run])
    assert_same_losses(run, plain)
    expected, given = (picture(folder / "validation" / f"step-{STEPS}" / "0.png") for folder in (plain, run))
    assert np.abs(given - expected).max() <= 1


def test_flax_trains_the_same_from_a_cache_of_torch(
    command: list[str], photos: list[str], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    assert torch_trainer.cache_data.main([*command, *photos, "--output_dir", str(cache)]) == 0
    monkeypatch.setattr(flax_trainer.training.step, "encode_images", pytest.fail)
    FLAX_HERE.train([*command, *PER_DEVICE, "--cached_data", cache, "--output_dir", run])
    assert_same_losses(run, plain)


def assert_same_losses(run: Path, plain: Path) -> None:
    assert max(relative(losses(run), losses(plain))) < 1e-4
    expected, given = (
        [entry["validation_loss"] for entry in metrics(folder) if "validation_loss" in entry] for folder in (plain, run)
    )
    assert max(relative(given, expected)) < 1e-4
