"""Images made during a PyTorch training, against diffusers' own pipeline and against the Flax sampler."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, UniPCMultistepScheduler
from PIL import Image

from flax_trainer.base_models import load_base_models as load_flax_models
from flax_trainer.distributed.pmap import PmapEngine
from flax_trainer.evaluation.image_sampler import ImageSampler as FlaxImageSampler
from flax_trainer.models.params import from_torch_layout
from shared.data.tokenization import PromptInputs, tokenizer_function
from shared.diffusion.drawing import Drawing
from shared.diffusion.samplers import initial_latents, validation_plan
from shared.models.source import ModelSource
from shared.models.tokenizer_files import read_tokenizer
from tests.torch_trainer.tiny_training import ROOT, awaken, configuration, schedule_of
from torch_trainer.base_models import BaseModels, load_base_models
from torch_trainer.evaluation.image_sampler import ImageSampler

DEMO_MODEL = ROOT / "shared" / "demo_model"
PROMPTS = ["red circle with blue background", "a cyan circle", "green circle with white background"]
RESOLUTION, SEED = 64, 11
ROUNDING = 2  # of 255


@pytest.fixture(scope="module")
def models() -> BaseModels:
    loaded = load_base_models(configuration(DEMO_MODEL, seed=SEED), torch.float32)
    awaken(loaded.controlnet)
    with torch.no_grad():  # Untrained, these layers let next to nothing of a condition through.
        for name, param in loaded.controlnet.controlnet_cond_embedding.named_parameters():
            param.mul_(3 if name.endswith("weight") else 1)
    return loaded


@pytest.fixture(scope="module")
def prompt_inputs() -> PromptInputs:
    return PromptInputs(tokenizer_function(read_tokenizer(ModelSource(DEMO_MODEL, "tokenizer"))))


@pytest.fixture(scope="module")
def conditions_RHWC() -> np.ndarray:
    """Discs at different places."""
    rows, columns = np.mgrid[:RESOLUTION, :RESOLUTION]
    discs = [(rows - centre) ** 2 + (columns - 32) ** 2 < 150 for centre in (20, 32, 44)]
    return np.stack([np.where(disc[..., None], 255, 0).repeat(3, axis=-1) for disc in discs]).astype(np.uint8)


def sampler(
    models: BaseModels, prompt_inputs: PromptInputs, *, guidance_scale: float, images_at_once: int = 3, seed: int = SEED
) -> ImageSampler:
    return ImageSampler(
        models,
        Drawing(validation_plan(schedule_of(DEMO_MODEL)), RESOLUTION, RESOLUTION, seed, guidance_scale),
        prompt_inputs,
        torch.device("cpu"),
        images_at_once=images_at_once,
    )


@torch.no_grad()
def draw(
    models: BaseModels,
    prompt_inputs: PromptInputs,
    conditions_RHWC: np.ndarray,
    indices: list[int],
    *,
    guidance_scale: float = 3.0,
    **options: int,
) -> np.ndarray:
    """The images of PROMPTS at these indices."""
    sample = sampler(models, prompt_inputs, guidance_scale=guidance_scale, **options)
    return sample([PROMPTS[index] for index in indices], conditions_RHWC[indices], indices).numpy()


@pytest.fixture(scope="module")
def pipeline(models: BaseModels) -> Any:
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        DEMO_MODEL, controlnet=models.controlnet, safety_checker=None
    )
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_images_are_those_of_diffusers_pipeline(
    models: BaseModels, prompt_inputs: PromptInputs, conditions_RHWC: np.ndarray, pipeline: Any, guidance_scale: float
) -> None:
    images = draw(models, prompt_inputs, conditions_RHWC, [0, 1, 2], guidance_scale=guidance_scale)
    latents_BHWC = initial_latents(SEED, [0, 1, 2], models.latent_shape(RESOLUTION))
    expected = pipeline(
        PROMPTS,
        image=[Image.fromarray(condition) for condition in conditions_RHWC],
        num_inference_steps=20,
        guidance_scale=guidance_scale,
        latents=torch.from_numpy(latents_BHWC).permute(0, 3, 1, 2),
        height=RESOLUTION,
        width=RESOLUTION,
        output_type="np",
    ).images
    assert images.dtype == np.uint8
    assert images.shape == expected.shape == (3, RESOLUTION, RESOLUTION, 3)
    assert expected.std() > 0.05, "a blank picture compares to anything"
    assert np.abs(images - expected * 255).max() < ROUNDING


def test_guidance_and_conditions_matter(
    models: BaseModels, prompt_inputs: PromptInputs, conditions_RHWC: np.ndarray
) -> None:
    """Without which the comparisons here would prove little."""
    plain, guided = (draw(models, prompt_inputs, conditions_RHWC, [0], guidance_scale=scale) for scale in (1.0, 3.0))
    elsewhere = draw(models, prompt_inputs, conditions_RHWC[::-1], [0])
    assert np.abs(plain.astype(int) - guided).max() > 20
    assert np.abs(elsewhere.astype(int) - guided).max() > 20


def test_an_image_depends_on_the_seed_and_its_index_alone(
    models: BaseModels, prompt_inputs: PromptInputs, conditions_RHWC: np.ndarray
) -> None:
    together = draw(models, prompt_inputs, conditions_RHWC, [0, 1, 2])
    for at_once in (1, 2):
        apart = draw(models, prompt_inputs, conditions_RHWC, [0, 1, 2], images_at_once=at_once)
        assert np.abs(apart.astype(int) - together).max() < ROUNDING
    torch.manual_seed(99)
    reordered = draw(models, prompt_inputs, conditions_RHWC, [2, 0])
    assert np.abs(reordered.astype(int) - together[[2, 0]]).max() < ROUNDING
    other_seed = draw(models, prompt_inputs, conditions_RHWC, [0], seed=SEED + 1)
    assert np.abs(other_seed.astype(int) - together[:1]).max() > 20


def test_models_in_training_draw_the_same(
    models: BaseModels, prompt_inputs: PromptInputs, conditions_RHWC: np.ndarray
) -> None:
    """Which are channels-last in memory."""
    expected = draw(models, prompt_inputs, conditions_RHWC, [1])
    for model in (models.controlnet, models.unet):
        model.to(memory_format=torch.channels_last)
    given = draw(models, prompt_inputs, conditions_RHWC, [1])
    for model in (models.controlnet, models.unet):
        model.to(memory_format=torch.contiguous_format)
    assert np.abs(given.astype(int) - expected).max() < ROUNDING


def test_flax_draws_the_same_picture(
    models: BaseModels, prompt_inputs: PromptInputs, conditions_RHWC: np.ndarray
) -> None:
    config = configuration(DEMO_MODEL, seed=SEED, resolution=RESOLUTION, guidance_scale=3.0)
    flax_models, initial = load_flax_models(config, schedule_of(DEMO_MODEL))
    layouts = flax_models.defs.controlnet.layouts
    params = {
        name: np.array(from_torch_layout(param.detach().numpy(), layouts[name]))
        for name, param in models.controlnet.named_parameters()
    }
    engine = PmapEngine()
    drawing = Drawing.of_training(config, flax_models.schedule)
    sample = FlaxImageSampler(engine, flax_models, prompt_inputs, drawing, images_per_device=1)
    with jax.default_matmul_precision("highest"):
        images = sample(engine.place_state(params), engine.place_frozen(initial.frozen), PROMPTS, conditions_RHWC)
    expected = draw(models, prompt_inputs, conditions_RHWC, [0, 1, 2], guidance_scale=3.0)
    assert np.abs(images.astype(int) - expected).max() < ROUNDING
