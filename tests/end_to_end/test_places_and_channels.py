"""Grey conditions, mirrored and cropped with their images: what was trained loads in diffusers, from either backend."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from tests.end_to_end.support.comparing import trained_weights
from tests.end_to_end.support.running import losses
from tests.end_to_end.support.tiny_runs import BATCH, FLAX_HERE, SIZE, TORCH
from tests.shared.data.pictures import pairs, write_prompt_json

STEPS = 2


@pytest.fixture(scope="module")
def runs(base_model: Path, condition: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    data = write_prompt_json(folder / "data", pairs(16))
    for backend in (FLAX_HERE, TORCH):
        backend.train(
            [
                *("--pretrained_model_name_or_path", str(base_model), "--resolution", SIZE, "--train_data_dir", data),
                *("--conditioning_channels", 1, "--conditioning_interpolation", "nearest"),
                *("--random_flip", "--random_crop", "--num_evaluation_samples", 2),
                *("--validation_image", str(condition), "--validation_prompt", "red", "--num_validation_images", 1),
                *("--max_train_steps", STEPS, "--learning_rate", "1e-3", "--lr_scheduler", "constant"),
                *("--train_batch_size", BATCH // backend.devices, "--output_dir", folder / backend.name),
            ]
        )
    return {backend.name: folder / backend.name for backend in (FLAX_HERE, TORCH)}


def test_both_backends_train_the_same(runs: dict[str, Path]) -> None:
    np.testing.assert_allclose(losses(runs["torch"]), losses(runs["flax"]), rtol=1e-4)
    expected, given = (trained_weights(runs[name]) for name in ("flax", "torch"))
    assert expected.keys() == given.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(given[name], value, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("name", ["flax", "torch"])
def test_diffusers_loads_a_controlnet_of_one_channel(runs: dict[str, Path], name: str) -> None:
    controlnet = diffusers.ControlNetModel.from_pretrained(runs[name])
    assert controlnet.config.conditioning_channels == 1
    assert controlnet.controlnet_cond_embedding.conv_in.in_channels == 1
    with torch.no_grad():
        residuals, _ = controlnet(
            torch.zeros(1, 4, SIZE // 8, SIZE // 8),
            torch.tensor([3]),
            torch.zeros(1, 77, controlnet.config.cross_attention_dim),
            torch.zeros(1, 1, SIZE, SIZE),
            return_dict=False,
        )
    assert all(residual.isfinite().all() for residual in residuals)
    assert (runs[name] / "validation" / f"step-{STEPS}" / "0.png").is_file()
    assert "conditioning_channels:\n- 1\n" in (runs[name] / "config.yaml").read_text()
