"""The demo's base model as it lies in the repository: small, loadable by diffusers and by Flax, and able to draw."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from flax_trainer.models import FlaxAutoencoderKL, FlaxCLIPTextModel, FlaxUNet2DConditionModel
from torch_trainer.make_demo_model.circles import draw_circles, normalise
from torch_trainer.make_demo_model.quality import caption_quality, reconstruction_quality

FOLDER = Path(__file__).parents[2] / "shared" / "demo_model"
UNSEEN_SEED = 77


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(FOLDER)


def test_the_folder_is_small_and_says_where_it_comes_from() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12_000_000
    assert "python3 -m torch_trainer.make_demo_model" in (FOLDER / "README.md").read_text()
    assert json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


def test_the_autoencoder_keeps_circles(pipeline: StableDiffusionPipeline) -> None:
    figures = reconstruction_quality(pipeline.vae, draw_circles(32, UNSEEN_SEED))
    assert figures["circle_iou"] >= 0.97
    assert figures["color_accuracy"] >= 0.9


def test_latents_have_unit_deviation(pipeline: StableDiffusionPipeline) -> None:
    with torch.no_grad():
        posterior = pipeline.vae.encode(normalise(draw_circles(64, UNSEEN_SEED).pixels_NCHW)).latent_dist
    latents = posterior.mean * pipeline.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_it_draws_round_discs_in_the_colours_of_the_caption(
    pipeline: StableDiffusionPipeline, guidance_scale: float
) -> None:
    figures = caption_quality(pipeline, draw_circles(16, UNSEEN_SEED).truths, guidance_scale, seed=0)
    assert figures["color_accuracy"] >= 0.75
    assert figures["circle_iou"] >= 0.85


def test_flax_computes_with_it_what_diffusers_computes(pipeline: StableDiffusionPipeline) -> None:
    rng = np.random.default_rng(0)
    sample_BHWC = rng.standard_normal((2, 8, 8, 4), dtype=np.float32)
    timesteps_B = np.array([10, 900])
    input_ids_BL = np.array(
        pipeline.tokenizer(["red circle with blue background", ""], padding="max_length").input_ids, np.int32
    )

    unet = FlaxUNet2DConditionModel.from_pretrained(str(FOLDER), subfolder="unet")
    vae = FlaxAutoencoderKL.from_pretrained(str(FOLDER), subfolder="vae")
    text_encoder = FlaxCLIPTextModel.from_pretrained(str(FOLDER), subfolder="text_encoder")

    @jax.jit
    def compute(sample_BHWC: jax.Array, timesteps_B: jax.Array, input_ids_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden_states_BLD, _ = text_encoder(input_ids_BL)
        return unet(sample_BHWC, timesteps_B, hidden_states_BLD), vae.decode(sample_BHWC)

    noise_BHWC, pixels_BHWC = compute(sample_BHWC, timesteps_B, input_ids_BL)

    with torch.no_grad():
        sample_BCHW = torch.from_numpy(sample_BHWC).permute(0, 3, 1, 2)
        text_BLD = pipeline.text_encoder(torch.from_numpy(input_ids_BL).long()).last_hidden_state
        expected_noise_BCHW = pipeline.unet(sample_BCHW, torch.from_numpy(timesteps_B), text_BLD).sample
        expected_pixels_BCHW = pipeline.vae.decode(sample_BCHW).sample
    for ours, theirs in ((noise_BHWC, expected_noise_BCHW), (pixels_BHWC, expected_pixels_BCHW)):
        np.testing.assert_allclose(jax.device_get(ours), theirs.permute(0, 2, 3, 1).numpy(), rtol=1e-4, atol=1e-4)
