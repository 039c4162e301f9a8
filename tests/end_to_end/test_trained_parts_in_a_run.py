"""A run with a trained decoder, control of the middle block alone and averaged weights: in Flax, then in either."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import ControlNetModel, UNet2DConditionModel

from tests.end_to_end.support.comparing import distance, picture, relative, trained_weights
from tests.end_to_end.support.running import metrics
from tests.end_to_end.support.tiny_runs import FLAX_HERE, PROMPT, SIZE, TORCH, begin_from

STEPS, HALF_WAY = 4, 2


@pytest.fixture(scope="module")
def runs(base_model: Path, condition: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Flax's, and the run that PyTorch finished from its half-way checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    command = [
        *("--pretrained_model_name_or_path", str(base_model), "--resolution", str(SIZE)),
        *("--generated_circles", "20", "--num_evaluation_samples", "4"),
        *("--max_train_steps", str(STEPS), "--checkpointing_steps", str(HALF_WAY), "--learning_rate", "1e-3"),
        *("--validation_image", str(condition), "--validation_prompt", PROMPT, "--num_validation_images", "2"),
        *("--use_ema", "--sd_unlocked", "--only_mid_control", "--gradient_checkpointing"),
    ]
    FLAX_HERE.train([*command, "--train_batch_size", "1", "--output_dir", folder / "flax"])
    begin_from(folder / "flax", HALF_WAY, folder / "torch")
    TORCH.train(
        [*command, "--train_batch_size", "8", "--output_dir", folder / "torch", "--resume_from_checkpoint", "latest"]
    )
    return folder / "flax", folder / "torch"


def test_figures_are_the_same(runs: tuple[Path, Path]) -> None:
    for expected, given in zip(*map(metrics, runs), strict=True):
        names = [name for name in expected if name in ("loss", "grad_norm") or name.startswith("validation_loss")]
        assert names
        assert max(relative([given[name] for name in names], [expected[name] for name in names])) < 1e-3


def test_the_results_are_the_same_and_load_in_diffusers(base_model: Path, runs: tuple[Path, Path]) -> None:
    base = UNet2DConditionModel.from_pretrained(base_model / "unet")
    for part in ("", "unet"):
        expected, given = (trained_weights(run / part) for run in runs)
        assert given.keys() == expected.keys()
        assert distance(given, expected) < 1e-3
    for run in runs:
        controlnet = ControlNetModel.from_pretrained(run)
        assert not any(param.any() for param in controlnet.controlnet_down_blocks.parameters())
        unet = UNet2DConditionModel.from_pretrained(run / "unet")
        changed = {
            name.split(".")[0] for name, param in unet.named_parameters() if (param != base.get_parameter(name)).any()
        }
        assert changed == {"up_blocks", "conv_norm_out", "conv_out"}
        assert json.loads((run / "report.json").read_text())["weights"] == "moving average"
        card = (run / "README.md").read_text()
        assert "moving average" in card
        assert 'subfolder="unet"' in card


def test_pictures_are_the_same(runs: tuple[Path, Path]) -> None:
    expected, given = (picture(run / "validation" / f"step-{STEPS}" / "0.png") for run in runs)
    assert np.abs(given - expected).mean() < 3
