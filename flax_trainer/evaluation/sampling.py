"""Images from a prompt and a condition, as pure functions.

Axes: B batch, H W height and width (pixels or latents), C channels, L tokens, D features.
"""

from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp

from flax_trainer.base_models import ModelDefs, Prompt
from flax_trainer.models.params import Params
from flax_trainer.training.step import ComputeParams, control_residuals, controlled_prediction
from shared.diffusion.control import FULL_CONTROL, Control
from shared.diffusion.samplers import (
    SamplerPlan,
    SamplerState,
    StepCoefficients,
    guided,
    initial_state,
    sampler_step,
)
from shared.user_errors import UserError


def sample_latents(
    models: ModelDefs,
    plan: SamplerPlan,
    params: ComputeParams,
    prompt: Prompt,
    negative_prompt: Prompt | None,
    controlnet_conds_BHWC: Sequence[jax.Array],
    latents_BHWC: jax.Array,
    *,
    guidance_scale: float,
    control: Control = FULL_CONTROL,
) -> jax.Array:
    """ControlNet sampling with classifier-free guidance, as diffusers' pipelines for Stable Diffusion (XL) do it.

    Args:
        models, plan, guidance_scale, control: fixed when compiled.
        prompt, negative_prompt: encoded prompts; the negative one may be None where `guidance_scale` ≤ 1.
        controlnet_conds_BHWC: the condition of each ControlNet, values in [0, 1], at the size of the image.
        latents_BHWC: unit Gaussian noise to start from, float32, at the size of the latents.

    Returns:
        float32 latents for `decode_latents`, still multiplied by the VAE's scaling factor.

    Raises:
        UserError: guidance is asked for without a negative prompt.
    """
    if guidance_scale > 1.0:
        if negative_prompt is None:
            raise UserError(
                f"guidance_scale is {guidance_scale} and there is no negative prompt; expected one (the empty prompt "
                "will do), or a guidance_scale of 1 or less."
            )
        # Unconditional first: one forward pass serves both.
        prompt = jax.tree.map(lambda *both: jnp.concatenate(both), negative_prompt, prompt)
        if not control.only_conditional:
            controlnet_conds_BHWC = [jnp.concatenate([cond_BHWC] * 2) for cond_BHWC in controlnet_conds_BHWC]
    dtype = next(iter(params.unet.values())).dtype
    prompt, controlnet_conds_BHWC = prompt.astype(dtype), [cond.astype(dtype) for cond in controlnet_conds_BHWC]
    controlnets = list(
        zip(
            (models.controlnet, *models.more_controlnets),
            (params.controlnet, *params.more_controlnets),
            controlnet_conds_BHWC,
            control.strengths,
            strict=True,
        )
    )

    def step(state: SamplerState, of_step: tuple[StepCoefficients, jax.Array]) -> tuple[SamplerState, None]:
        coefficients, conditioning_scales_N = of_step
        sample_BHWC = (jnp.concatenate([state.sample] * 2) if guidance_scale > 1.0 else state.sample).astype(dtype)
        timesteps_B = jnp.broadcast_to(coefficients.timestep, sample_BHWC.shape[:1])
        inputs = (sample_BHWC, timesteps_B, prompt)
        residuals_of_each = [
            control_residuals(
                *(controlnet, own_params, *inputs, cond_BHWC),
                conditioning_scale=conditioning_scale.astype(dtype),
                graded=strength.graded,
            )
            for (controlnet, own_params, cond_BHWC, strength), conditioning_scale in zip(
                controlnets, conditioning_scales_N, strict=True
            )
        ]
        residuals = [reduce(jnp.add, of_all) for of_all in zip(*residuals_of_each, strict=True)]
        output_BHWC = controlled_prediction(models.unet, params.unet, *inputs, residuals)
        if guidance_scale > 1.0:
            unconditional_BHWC, conditional_BHWC = jnp.split(output_BHWC, 2)
            output_BHWC = guided(unconditional_BHWC, conditional_BHWC, guidance_scale)
        return sampler_step(plan, coefficients, state, output_BHWC), None

    start = initial_state(plan, latents_BHWC.astype(jnp.float32))
    steps = (plan.coefficients, control.scales(plan.num_inference_steps))
    final, _ = jax.lax.scan(step, start, jax.tree.map(jnp.asarray, steps))
    return final.sample


def decode_latents(models: ModelDefs, vae_params: Params, latents_BHWC: jax.Array, scaling_factor: float) -> jax.Array:
    """float32 images [B, H, W, 3] in [0, 1]; `scaling_factor` is the VAE configuration's."""
    with jax.named_scope("vae"):
        dtype = next(iter(vae_params.values())).dtype
        pixels_BHWC = models.vae.bind(vae_params).decode((latents_BHWC / scaling_factor).astype(dtype))
    return jnp.clip(pixels_BHWC.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)
