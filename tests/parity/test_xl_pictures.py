"""Pictures of Stable Diffusion XL in training: those of diffusers' pipeline in PyTorch, and the same in Flax."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLControlNetPipeline, UniPCMultistepScheduler
from PIL import Image

from flax_trainer.base_models import load_base_models as load_flax_models
from flax_trainer.distributed.pmap import PmapEngine
from flax_trainer.evaluation.image_sampler import ImageSampler as FlaxImageSampler
from flax_trainer.models.params import from_torch_layout
from shared.data.tokenization import PromptInputs, XLInputs, tokenizer_function
from shared.diffusion.drawing import Drawing
from shared.diffusion.samplers import SamplerPlan, euler_plan, initial_latents, unipc_plan
from shared.diffusion.schedule import NoiseSchedule
from shared.models.source import ModelSource
from shared.models.tokenizer_files import read_tokenizer
from shared.models.xl import sizes_of_crop
from tests.torch_trainer.tiny_training import awaken, configuration, schedule_of
from torch_trainer.base_models import BaseModels, load_base_models
from torch_trainer.evaluation.image_sampler import ImageSampler

PROMPTS = ["red circle with blue background", "a cyan circle"]
RESOLUTION, SEED, GUIDANCE, STEPS = 64, 11, 3.0, 4
INDICES = [0, 1]


@pytest.fixture(scope="module")
def models(xl_model: Path) -> BaseModels:
    torch.set_num_threads(1)
    loaded = load_base_models(configuration(xl_model, seed=SEED), torch.float32)
    awaken(loaded.controlnet)
    return loaded


@pytest.fixture(scope="module")
def conditions_RHWC() -> np.ndarray:
    rows, columns = np.mgrid[:RESOLUTION, :RESOLUTION]
    discs = [(rows - centre) ** 2 + (columns - 32) ** 2 < 150 for centre in (20, 44)]
    return np.stack([np.where(disc[..., None], 255, 0).repeat(3, axis=-1) for disc in discs]).astype(np.uint8)


def prompt_inputs(xl_model: Path, *, zeros: bool = True) -> PromptInputs:
    """As a training that crops has them, which sampling must not ask for."""
    first, second = (
        tokenizer_function(read_tokenizer(ModelSource(xl_model, name))) for name in ("tokenizer", "tokenizer_2")
    )
    return PromptInputs(first, XLInputs(second, sizes_of_crop(RESOLUTION, 9, 7), zeros))


def drawn(
    models: BaseModels,
    xl_model: Path,
    conditions_RHWC: np.ndarray,
    *,
    zeros: bool = True,
    plan: SamplerPlan | None = None,
) -> np.ndarray:
    sampler = ImageSampler(
        models,
        Drawing(plan or unipc_plan(schedule_of(xl_model), STEPS), RESOLUTION, RESOLUTION, SEED, GUIDANCE),
        prompt_inputs(xl_model, zeros=zeros),
        torch.device("cpu"),
        images_at_once=2,
    )
    with torch.no_grad():
        return sampler(PROMPTS, conditions_RHWC, INDICES).numpy()


@pytest.fixture(scope="module")
def expected(models: BaseModels, xl_model: Path, conditions_RHWC: np.ndarray) -> np.ndarray:
    return drawn(models, xl_model, conditions_RHWC)


def pipeline_of(models: BaseModels, xl_model: Path, **options: bool) -> Any:
    pipeline: Any = StableDiffusionXLControlNetPipeline.from_pretrained(
        xl_model, controlnet=models.controlnet, add_watermarker=False, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by(pipeline: Any, models: BaseModels, conditions_RHWC: np.ndarray) -> np.ndarray:
    """float32 [R,H,W,C] in [0, 1]."""
    latents_BHWC = initial_latents(SEED, INDICES, models.latent_shape(RESOLUTION))
    images: np.ndarray = pipeline(
        PROMPTS,
        image=[Image.fromarray(condition) for condition in conditions_RHWC],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(latents_BHWC).permute(0, 3, 1, 2),
        height=RESOLUTION,
        width=RESOLUTION,
        output_type="np",
    ).images
    return images


@pytest.mark.parametrize("zeros", [True, False], ids=["from zeros", "from the empty prompt"])
def test_they_are_those_of_diffusers_pipeline(
    models: BaseModels, xl_model: Path, conditions_RHWC: np.ndarray, expected: np.ndarray, zeros: bool
) -> None:
    pipeline = pipeline_of(models, xl_model, force_zeros_for_empty_prompt=zeros)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    theirs = drawn_by(pipeline, models, conditions_RHWC)
    ours = expected if zeros else drawn(models, xl_model, conditions_RHWC, zeros=False)
    assert theirs.std() > 0.05, "a blank picture compares to anything"
    assert np.abs(ours - theirs * 255).mean() < 0.5
    assert zeros or np.abs(ours.astype(int) - expected).max() > 2, "what is guided away from matters"


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_by_eulers_method_too(
    models: BaseModels, xl_model: Path, conditions_RHWC: np.ndarray, expected: np.ndarray, spacing: str
) -> None:
    """As the scheduler of Stable Diffusion XL says; its pipeline starts from other noise where it says otherwise."""
    pipeline = pipeline_of(models, xl_model)
    config = dict(pipeline.scheduler.config) | {"timestep_spacing": spacing}
    pipeline.scheduler = EulerDiscreteScheduler.from_config(config)
    theirs = drawn_by(pipeline, models, conditions_RHWC)
    ours = drawn(models, xl_model, conditions_RHWC, plan=euler_plan(NoiseSchedule.from_config(config), STEPS))
    assert np.abs(ours - theirs * 255).mean() < 0.5
    assert np.abs(ours.astype(int) - expected).mean() > 1, "another sampler draws another picture"


def test_flax_draws_the_same(
    models: BaseModels,
    xl_model: Path,
    conditions_RHWC: np.ndarray,
    expected: np.ndarray,
) -> None:
    config = configuration(xl_model, seed=SEED, resolution=RESOLUTION, guidance_scale=GUIDANCE)
    flax_models, initial = load_flax_models(config, schedule_of(xl_model))
    layouts = flax_models.defs.controlnet.layouts
    params = {
        name: np.array(from_torch_layout(param.detach().numpy(), layouts[name]))
        for name, param in models.controlnet.named_parameters()
    }
    engine = PmapEngine()
    drawing = Drawing(unipc_plan(flax_models.schedule, STEPS), RESOLUTION, RESOLUTION, SEED, GUIDANCE)
    sample = FlaxImageSampler(engine, flax_models, prompt_inputs(xl_model), drawing, images_per_device=1)
    with jax.default_matmul_precision("highest"):
        images = sample(engine.place_state(params), engine.place_frozen(initial.frozen), PROMPTS, conditions_RHWC)
    assert np.abs(images.astype(int) - expected).mean() < 0.5
