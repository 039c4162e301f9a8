"""A run with a trained decoder, control of the middle block alone and averaged weights: in Flax, then in either."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image

import flax_trainer.generate
import torch_trainer.generate
from shared.checkpoints.trained_params import read_trained_params
from shared.models.trained_parts import is_decoder, with_unet_prefix
from tests.end_to_end.support.comparing import distance, picture, relative, trained_weights
from tests.end_to_end.support.running import metrics
from tests.end_to_end.support.tiny_runs import FLAX_HERE, PROMPT, SIZE, TORCH, begin_from
from tests.torch_trainer.tiny_training import forget_accelerate_state

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


def test_a_checkpoint_holds_what_the_run_ends_with(runs: tuple[Path, Path]) -> None:
    """As pictures of it are drawn: the average, the decoder too."""
    for run in runs:
        controlnet, unet = trained_weights(run), trained_weights(run / "unet")
        expected = controlnet | with_unet_prefix({name: unet[name] for name in unet if is_decoder(name)})
        given = read_trained_params(run / f"checkpoint-{STEPS}", {name: x.shape for name, x in expected.items()})
        assert given.keys() == expected.keys()
        assert all(np.array_equal(given[name], expected[name]) for name in expected)
        with pytest.raises(ValueError, match="nothing expected"):
            read_trained_params(run / f"checkpoint-{STEPS}", {"conv_in.weight": (1, 2)})


def test_pictures_of_a_checkpoint_are_those_of_the_run(
    runs: tuple[Path, Path], condition: Path, tmp_path: Path
) -> None:
    """Of either backend's in either."""
    words = ["--conditioning_image", str(condition), "--prompt", PROMPT, "--num_inference_steps", "2"]

    def drawn(program: Any, controlnet: Path) -> np.ndarray:
        folder = tmp_path / f"{program.__name__}-{controlnet.parent.name}-{controlnet.name}"
        where = ["--controlnet_model_name_or_path", str(controlnet), "--output_dir", str(folder)]
        forget_accelerate_state()
        assert program.main([*words, *where]) == 0
        return np.asarray(Image.open(folder / "000.png")).astype(int)

    flax_run, torch_run = runs
    expected = drawn(torch_trainer.generate, flax_run)
    assert expected.std() > 5
    for program, checkpoint in (
        (torch_trainer.generate, flax_run / f"checkpoint-{STEPS}"),
        (torch_trainer.generate, torch_run / f"checkpoint-{STEPS}"),
        (flax_trainer.generate, torch_run / f"checkpoint-{STEPS}"),
    ):
        assert np.abs(drawn(program, checkpoint) - expected).mean() < 0.5
    half_way = drawn(torch_trainer.generate, flax_run / f"checkpoint-{HALF_WAY}")
    assert np.abs(half_way - expected).max() > 0, "which checkpoint it is matters"
