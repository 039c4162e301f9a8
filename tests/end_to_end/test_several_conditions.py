"""Depth and edges steer one ControlNet: trained alike by both backends, resumed, drawn with, loaded in diffusers."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import flax_trainer.generate
import torch_trainer.generate
from flax_trainer.models import FlaxControlNetModel
from flax_trainer.pipeline import FlaxStableDiffusionControlNetPipeline
from shared import check_run
from shared.data.preprocessing import decode
from tests.end_to_end.support.comparing import distance, trained_weights
from tests.end_to_end.support.running import losses, metrics
from tests.end_to_end.support.tiny_runs import BATCH, FLAX_HERE, PROMPT, SIZE, TORCH, begin_from
from tests.shared.data.several import CHANNELS, COLUMNS, samples, write_prompt_json
from tests.torch_trainer.tiny_training import forget_accelerate_state

STEPS, HALF_WAY = 4, 2


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A picture of each condition."""
    folder, (sample,) = tmp_path_factory.mktemp("conditions"), samples(1)
    for column in COLUMNS:
        (folder / f"{column}.png").write_bytes(sample[column])
    return [str(folder / f"{column}.png") for column in COLUMNS]


@pytest.fixture(scope="module")
def runs(base_model: Path, group: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Flax's, and the run that PyTorch finished from its half-way checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    command = [
        *("--pretrained_model_name_or_path", base_model, "--resolution", SIZE),
        *("--train_data_dir", write_prompt_json(folder / "data", samples(12))),
        *("--conditioning_image_column", *COLUMNS, "--conditioning_channels", *CHANNELS),
        *("--num_evaluation_samples", 2, "--random_flip"),
        *("--validation_image", *group, "--validation_prompt", PROMPT, "--num_validation_images", 1),
        *("--max_train_steps", STEPS, "--checkpointing_steps", HALF_WAY, "--validation_steps", STEPS),
        *("--learning_rate", "1e-3", "--lr_scheduler", "constant"),
    ]
    FLAX_HERE.train([*command, "--train_batch_size", BATCH // FLAX_HERE.devices, "--output_dir", folder / "flax"])
    begin_from(folder / "flax", HALF_WAY, folder / "torch")
    resumed = ("--resume_from_checkpoint", "latest")
    TORCH.train([*command, "--train_batch_size", BATCH, "--output_dir", folder / "torch", *resumed])
    return folder / "flax", folder / "torch"


def test_both_backends_train_the_same(runs: tuple[Path, Path]) -> None:
    expected, given = runs
    assert len(losses(given)) == STEPS
    np.testing.assert_allclose(losses(given), losses(expected), rtol=1e-4)
    held_out = [[entry["validation_loss"] for entry in metrics(run) if "validation_loss" in entry] for run in runs]
    assert held_out[0]
    np.testing.assert_allclose(held_out[1][-1], held_out[0][-1], rtol=1e-4)
    assert distance(trained_weights(given), trained_weights(expected)) < 1e-3
    for run in runs:
        assert check_run.main([str(run)]) == 0


def test_sheets_show_both_conditions(runs: tuple[Path, Path]) -> None:
    for run in runs:
        with Image.open(run / "validation" / f"step-{STEPS}" / "0.png") as sheet:
            assert sheet.width > 3 * SIZE
        assert 'modes = ["L", "RGB"]' in (run / "README.md").read_text()


def test_diffusers_draws_with_it_as_either_backend_does(
    runs: tuple[Path, Path], group: list[str], tmp_path: Path
) -> None:
    """PyTorch's is diffusers' own `ControlNetModel`."""
    controlnet = diffusers.ControlNetModel.from_pretrained(runs[0])
    assert controlnet.config.conditioning_channels == sum(CHANNELS)
    assert controlnet.controlnet_cond_embedding.conv_in.in_channels == 4

    def drawn(program: Any, run: Path | tuple[Path, ...], *conditions: str, scale: float = 1.0) -> np.ndarray:
        folder = tmp_path / f"{program.__name__}-{len(list(tmp_path.iterdir()))}"
        words = ["--conditioning_image", *conditions, "--prompt", PROMPT, "--num_inference_steps", "2"]
        names = map(str, run if isinstance(run, tuple) else (run,))
        where = ["--controlnet_model_name_or_path", *names, "--output_dir", str(folder)]
        words += ["--controlnet_conditioning_scale", str(scale)]
        forget_accelerate_state()
        assert program.main([*words, *where]) == 0
        return np.asarray(Image.open(folder / "000.png")).astype(int)

    expected = drawn(torch_trainer.generate, runs[0], *group)
    assert expected.std() > 5
    checkpoint = runs[1] / f"checkpoint-{STEPS}"
    assert np.abs(drawn(flax_trainer.generate, checkpoint, *group) - expected).mean() < 0.5
    for program in (flax_trainer.generate, torch_trainer.generate):
        both = drawn(program, (runs[0], checkpoint), *group, *group, scale=0.5)  # halves of the same twice
        assert np.abs(both - expected).mean() < 0.5
    pipeline = FlaxStableDiffusionControlNetPipeline.from_pretrained(controlnet=[runs[0], checkpoint])
    pictures = [decode(Path(path), channels) for path, channels in zip(group, CHANNELS, strict=True)]
    options: dict[str, Any] = {
        "num_inference_steps": 2,
        "resolution": SIZE,
        "controlnet_conditioning_scale": [0.5, 0.5],
    }
    (given,) = pipeline(PROMPT, image=pictures * 2, **options).images
    assert np.abs(np.asarray(given).astype(int) - expected).mean() < 0.5
    with pytest.raises(ValueError, match="An image of 1 pictures was given, and there are 4 conditions"):
        pipeline(PROMPT, image=[pictures[:1]])
    assert np.abs(drawn(torch_trainer.generate, runs[0], *group[::-1]) - expected).max() > 0, "which is which matters"


def test_residuals_are_those_of_diffusers(runs: tuple[Path, Path], base_model: Path) -> None:
    ours, theirs = FlaxControlNetModel.from_pretrained(runs[0]), diffusers.ControlNetModel.from_pretrained(runs[0])
    rng = np.random.default_rng(0)
    sample_BHWC = rng.standard_normal((1, SIZE // 8, SIZE // 8, 4), np.float32)
    text_BLD = rng.standard_normal((1, 77, theirs.config.cross_attention_dim), np.float32)
    condition_BHWC = rng.random((1, SIZE, SIZE, 4), np.float32)
    given, middle = ours(sample_BHWC, np.array([7]), text_BLD, condition_BHWC)
    with torch.no_grad():
        nchw = [torch.from_numpy(array).permute(0, 3, 1, 2) for array in (sample_BHWC, condition_BHWC)]
        expected, expected_middle = theirs(
            nchw[0], torch.tensor([7]), torch.from_numpy(text_BLD), nchw[1], return_dict=False
        )
    for ours_BHWC, theirs_BCHW in zip((*given, middle), (*expected, expected_middle), strict=True):
        assert theirs_BCHW.abs().max() > 0
        np.testing.assert_allclose(ours_BHWC, theirs_BCHW.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-6)
