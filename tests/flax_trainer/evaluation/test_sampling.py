"""Sampling against a plain loop over diffusers' scheduler, with small stand-ins for the networks.

Axes: B batch, H W height and width, C channels, L tokens, D features.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from flax import nnx

from flax_trainer.base_models import ModelDefs, Prompt
from flax_trainer.evaluation.sampling import decode_latents, sample_latents
from flax_trainer.models.params import Params, cast, split
from flax_trainer.training.step import ComputeParams
from shared.diffusion.control import Control, Strength
from shared.diffusion.samplers import SamplerPlan, ddim_plan, initial_latents, unipc_plan
from shared.diffusion.schedule import NoiseSchedule
from shared.user_errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "timestep_spacing": "leading",
    "prediction_type": "v_prediction",
}
SCALING_FACTOR = 0.5
BATCH, SIDE, FACTOR = 2, 4, 8


class FakeUNet(nnx.Module):
    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.asarray(0.3), layout="plain")

    def __call__(
        self,
        sample_BHWC: jax.Array,
        timesteps_B: jax.Array,
        encoder_hidden_states_BLD: jax.Array,
        *,
        down_block_additional_residuals: tuple[jax.Array, ...],
        mid_block_additional_residual: jax.Array,
        added_cond_kwargs: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        assert sample_BHWC.dtype == encoder_hidden_states_BLD.dtype == mid_block_additional_residual.dtype
        assert timesteps_B.shape == sample_BHWC.shape[:1]
        text_B111 = encoder_hidden_states_BLD.mean(axis=(1, 2))[:, None, None, None]
        if added_cond_kwargs is not None:
            text_B111 += added_cond_kwargs["text_embeds"].mean(axis=1)[:, None, None, None]
        time_B111 = (timesteps_B / 1000).astype(sample_BHWC.dtype)[:, None, None, None]
        control_BHWC = sum(down_block_additional_residuals) + mid_block_additional_residual
        return self.weight[...] * sample_BHWC + text_B111 * time_B111 + control_BHWC


class FakeControlNet(nnx.Module):
    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.asarray(0.2), layout="plain")

    def __call__(
        self,
        sample_BHWC: jax.Array,
        timesteps_B: jax.Array,
        encoder_hidden_states_BLD: jax.Array,
        controlnet_cond_BHWC: jax.Array,
        conditioning_scale: float = 1.0,
        added_cond_kwargs: dict[str, jax.Array] | None = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        assert controlnet_cond_BHWC.dtype == sample_BHWC.dtype == encoder_hidden_states_BLD.dtype
        condition_BHW1 = controlnet_cond_BHWC[:, ::FACTOR, ::FACTOR].mean(axis=-1, keepdims=True)
        text_B111 = encoder_hidden_states_BLD.mean(axis=(1, 2))[:, None, None, None]
        residual_BHWC = conditioning_scale * self.weight[...] * (condition_BHW1 + 0.1 * sample_BHWC + text_B111)
        return (residual_BHWC,), 2 * residual_BHWC


class FakeVAE(nnx.Module):
    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.asarray(0.2), layout="plain")

    def decode(self, latents_BHWC: jax.Array) -> jax.Array:
        return jnp.tanh(self.weight[...] * latents_BHWC[..., :3]).repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)


def reference_images(
    scheduler: Any,
    prompt: Any,
    negative_prompt: Any,
    condition: np.ndarray,
    latents: np.ndarray,
    count: int,
    guidance_scale: float,
    conditioning_scale: float,
) -> np.ndarray:
    """The fakes' formulas once more, in numpy, unconditional and conditional passes apart."""
    scheduler.set_timesteps(count)
    sample = torch.from_numpy(latents)

    def predict(text_BLD: np.ndarray, x: np.ndarray, timestep: float) -> np.ndarray:
        text = text_BLD.mean(axis=(1, 2))[:, None, None, None]
        control = condition[:, ::FACTOR, ::FACTOR].mean(axis=-1, keepdims=True)
        residual = conditioning_scale * 0.2 * (control + 0.1 * x + text)
        return 0.3 * x + text * timestep / 1000 + 3 * residual

    for timestep in scheduler.timesteps:
        x = sample.numpy()
        conditional = predict(prompt, x, float(timestep))
        unconditional = predict(negative_prompt, x, float(timestep))
        output = unconditional + guidance_scale * (conditional - unconditional)
        sample = scheduler.step(torch.from_numpy(output), timestep, sample, return_dict=False)[0]
    pixels = np.tanh(0.2 * sample.numpy()[..., :3] / SCALING_FACTOR).repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)
    return np.clip(pixels / 2 + 0.5, 0, 1)


@pytest.fixture
def fakes() -> tuple[ModelDefs, ComputeParams, Params]:
    """Models, and the parameters of the networks and of the VAE."""
    unet, unet_params = split(FakeUNet())
    controlnet, controlnet_params = split(FakeControlNet())
    vae, vae_params = split(FakeVAE())
    defs: Any = ModelDefs(controlnet, unet, vae, text_encoder=None)  # type: ignore[arg-type]
    return defs, ComputeParams(controlnet_params, unet_params), vae_params


def sample_images(
    defs: ModelDefs, plan: SamplerPlan, params: ComputeParams, vae_params: Params, *inputs: Any, **options: Any
) -> jax.Array:
    latents = sample_latents(defs, plan, params, *inputs, **options)
    return decode_latents(defs, vae_params, latents, SCALING_FACTOR)


@pytest.fixture
def inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "prompt": random.standard_normal((BATCH, 5, 6)).astype(np.float32),
        "negative": random.standard_normal((BATCH, 5, 6)).astype(np.float32),
        "condition": random.random((BATCH, SIDE * FACTOR, SIDE * FACTOR, 3), np.float32),
        "latents": initial_latents(0, [0, 1], (SIDE, SIDE, 4)),
    }


def plan_of(count: int = 6) -> SamplerPlan:
    return unipc_plan(NoiseSchedule.from_config(SCHEDULER), count)


def arguments(inputs: dict[str, np.ndarray]) -> tuple[Prompt, Prompt, list[jax.Array], jax.Array]:
    prompt, negative, condition, latents = (
        jnp.asarray(inputs[name]) for name in ("prompt", "negative", "condition", "latents")
    )
    return Prompt(prompt), Prompt(negative), [condition], latents


@pytest.mark.parametrize(
    ("plan_function", "scheduler"), [(unipc_plan, UniPCMultistepScheduler), (ddim_plan, DDIMScheduler)]
)
@pytest.mark.parametrize("guidance_scale", [1.5, 7.5])
def test_images_are_those_of_diffusers_loop(
    fakes: Any, inputs: dict[str, np.ndarray], plan_function: Any, scheduler: Any, guidance_scale: float
) -> None:
    defs, params, vae_params = fakes
    plan = plan_function(NoiseSchedule.from_config(SCHEDULER), 6)
    sample = jax.jit(
        partial(sample_images, defs, plan, guidance_scale=guidance_scale, control=Control((Strength(0.7),)))
    )
    images = sample(params, vae_params, *arguments(inputs))
    expected = reference_images(
        scheduler.from_config(SCHEDULER),
        inputs["prompt"],
        inputs["negative"],
        inputs["condition"],
        inputs["latents"],
        6,
        guidance_scale,
        0.7,
    )
    assert images.dtype == jnp.float32
    assert images.shape == (BATCH, SIDE * FACTOR, SIDE * FACTOR, 3)
    assert expected.std() > 0.05
    assert ((expected > 0.05) & (expected < 0.95)).mean() > 0.5
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5)


def test_without_guidance_the_negative_prompt_plays_no_part(fakes: Any, inputs: dict[str, np.ndarray]) -> None:
    defs, params, _ = fakes
    prompt, negative, condition, latents = arguments(inputs)
    alone = sample_latents(defs, plan_of(), params, prompt, None, condition, latents, guidance_scale=1.0)
    # Guidance from a prompt to itself is no guidance.
    together = sample_latents(defs, plan_of(), params, prompt, prompt, condition, latents, guidance_scale=5.0)
    guided = sample_latents(defs, plan_of(), params, prompt, negative, condition, latents, guidance_scale=5.0)
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-5)
    assert np.abs(alone - guided).max() > 0.1


def test_guidance_needs_a_negative_prompt(fakes: Any, inputs: dict[str, np.ndarray]) -> None:
    defs, params, _ = fakes
    prompt, _, condition, latents = arguments(inputs)
    with pytest.raises(UserError, match="negative prompt"):
        sample_latents(defs, plan_of(), params, prompt, None, condition, latents, guidance_scale=7.5)


def test_models_compute_in_their_parameters_dtype_and_the_sampler_in_float32(
    fakes: Any, inputs: dict[str, np.ndarray]
) -> None:
    defs, params, vae_params = fakes
    half = ComputeParams(*(cast(part, jnp.bfloat16) for part in params[:2])), cast(vae_params, jnp.bfloat16)
    exact = sample_images(defs, plan_of(), params, vae_params, *arguments(inputs), guidance_scale=2.0)
    rounded = sample_images(defs, plan_of(), *half, *arguments(inputs), guidance_scale=2.0)
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(exact - rounded).max() < 0.05


def test_added_conditions_reach_the_networks(fakes: Any, inputs: dict[str, np.ndarray]) -> None:
    defs, params, _ = fakes
    prompt, negative, condition, latents = arguments(inputs)
    added = {"text_embeds": jnp.ones((BATCH, 3))}
    plain = sample_latents(defs, plan_of(), params, prompt, negative, condition, latents, guidance_scale=7.5)
    both = sample_latents(
        defs,
        plan_of(),
        params,
        prompt._replace(added_cond_kwargs=added),
        negative._replace(added_cond_kwargs=added),
        condition,
        latents,
        guidance_scale=7.5,
    )
    assert np.abs(plain - both).max() > 0.1


def test_pmap_gives_what_jit_gives(fakes: Any, inputs: dict[str, np.ndarray]) -> None:
    defs, params, vae_params = fakes
    sample = partial(sample_images, defs, plan_of(), guidance_scale=3.0)
    devices = jax.local_device_count()

    def on_devices(tree: Any) -> Any:
        return jax.tree.map(lambda array: jnp.stack([array] * devices), tree)

    given = (params, vae_params, *arguments(inputs))
    mapped = jax.pmap(sample)(*map(on_devices, given))
    assert mapped.shape[0] == devices
    np.testing.assert_allclose(mapped[-1], jax.jit(sample)(*given), rtol=0, atol=1e-6)
