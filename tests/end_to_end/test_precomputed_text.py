"""Runs whose captions are encoded once, before the first step, against a run that encodes them in every step.

The base model is a Stable Diffusion XL, which is told of every photo's own size and crop.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.support.comparing import picture, relative
from tests.end_to_end.support.running import losses, metrics, train_torch_here, untimed_metrics
from tests.end_to_end.support.tiny_runs import BATCH, FLAX_HERE, PROMPT, SIZE, begin_from
from tests.shared.data.pictures import pairs, write_image_folder
from torch_trainer import text_encoding

STEPS, HALF_WAY = 4, 2


@pytest.fixture(scope="module")
def command(xl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    photos = write_image_folder(tmp_path_factory.mktemp("data"), pairs())
    return [
        *("--pretrained_model_name_or_path", str(xl_model), "--train_data_dir", str(photos)),
        *("--resolution", str(SIZE), "--num_evaluation_samples", "4", "--time_ids_from_data"),
        *("--max_train_steps", str(STEPS), "--checkpointing_steps", str(HALF_WAY), "--learning_rate", "1e-3"),
        *("--proportion_empty_prompts", "0.3", "--report_to", "none"),
        *("--cache_dir", str(tmp_path_factory.mktemp("cache"))),
    ]


@pytest.fixture(scope="module")
def in_torch(command: list[str], condition: Path) -> list[str]:
    return [
        *command,
        *("--train_batch_size", str(BATCH), "--num_validation_images", "1"),
        *("--validation_image", str(condition), "--validation_prompt", PROMPT),
    ]


@pytest.fixture(scope="module")
def plain(in_torch: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the flag."""
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


def test_flax_trains_the_same(command: list[str], plain: Path, tmp_path: Path) -> None:
    size = ["--train_batch_size", BATCH // FLAX_HERE.devices]
    FLAX_HERE.train([*command, *size, "--precompute_text", "--output_dir", tmp_path])
    assert max(relative(losses(tmp_path), losses(plain))) < 1e-4
    expected, given = (
        [entry["validation_loss"] for entry in metrics(run) if "validation_loss" in entry] for run in (plain, tmp_path)
    )
    assert max(relative(given, expected)) < 1e-4
