"""Images from a prompt and a condition, as one pure function.

Axes: B batch, H W height and width (pixels or latents), C channels, L tokens, D features.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_trainer.models.params import ModelDef, Params
from shared.diffusion.samplers import SamplerPlan, SamplerState, StepCoefficients, initial_state, sampler_step
from shared.user_errors import UserError


@dataclass(frozen=True)
class SamplingDefs:
    """The structures that sampling uses (any modules with the UNet's, ControlNet's and VAE's call signatures)."""

    unet: ModelDef[Any]
    controlnet: ModelDef[Any]
    vae: ModelDef[Any]
    scaling_factor: float  # the VAE configuration's: latents are multiplied by it


class SamplingParams(NamedTuple):
    """Their parameters. Each model computes in the dtype that its own parameters have."""

    unet: Params
    controlnet: Params
    vae: Params


class Prompt(NamedTuple):
    """What the text encoders made of each image's prompt. `added_cond_kwargs` is SDXL's, arrays of axis B first."""

    encoder_hidden_states_BLD: jax.Array
    added_cond_kwargs: dict[str, jax.Array] | None = None


def sample_images(
    defs: SamplingDefs,
    plan: SamplerPlan,
    params: SamplingParams,
    prompt: Prompt,
    negative_prompt: Prompt | None,
    controlnet_cond_BHWC: jax.Array,
    latents_BHWC: jax.Array,
    *,
    guidance_scale: float = 7.5,
    conditioning_scale: float = 1.0,
) -> jax.Array:
    """ControlNet sampling with classifier-free guidance, as diffusers' StableDiffusionControlNetPipeline does it.

    Pure: jit or pmap it with `functools.partial(sample_images, defs, plan, guidance_scale=…)`.

    Args:
        defs, plan, guidance_scale, conditioning_scale: fixed when compiled.
        params: the models' parameters.
        prompt, negative_prompt: encoded prompts; the negative one may be None where `guidance_scale` ≤ 1.
        controlnet_cond_BHWC: the condition, values in [0, 1], at the size of the image.
        latents_BHWC: unit Gaussian noise to start from, float32, at the size of the latents.

    Returns:
        float32 [B, H, W, 3] in [0, 1].

    Raises:
        UserError: guidance is asked for without a negative prompt.
    """
    final_BHWC = sample_latents(
        defs,
        plan,
        params,
        prompt,
        negative_prompt,
        controlnet_cond_BHWC,
        latents_BHWC,
        guidance_scale=guidance_scale,
        conditioning_scale=conditioning_scale,
    )
    with jax.named_scope("vae"):
        scaled_BHWC = (final_BHWC / defs.scaling_factor).astype(_dtype(params.vae))
        pixels_BHWC = defs.vae.bind(params.vae).decode(scaled_BHWC)
    return jnp.clip(pixels_BHWC.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)


def sample_latents(
    defs: SamplingDefs,
    plan: SamplerPlan,
    params: SamplingParams,
    prompt: Prompt,
    negative_prompt: Prompt | None,
    controlnet_cond_BHWC: jax.Array,
    latents_BHWC: jax.Array,
    *,
    guidance_scale: float = 7.5,
    conditioning_scale: float = 1.0,
) -> jax.Array:
    """`sample_images` before the decoder: final latents, float32, still multiplied by the scaling factor."""
    guided = guidance_scale > 1.0
    if guided:
        if negative_prompt is None:
            raise UserError(
                f"guidance_scale is {guidance_scale} and there is no negative prompt; expected one (the empty prompt "
                "will do), or a guidance_scale of 1 or less."
            )
        # Unconditional first: one forward pass serves both.
        prompt = jax.tree.map(lambda *both: jnp.concatenate(both), negative_prompt, prompt)
        controlnet_cond_BHWC = jnp.concatenate([controlnet_cond_BHWC] * 2)

    def step(state: SamplerState, coefficients: StepCoefficients) -> tuple[SamplerState, None]:
        sample_BHWC = jnp.concatenate([state.sample] * 2) if guided else state.sample
        output_BHWC = _predict(
            defs, params, prompt, controlnet_cond_BHWC, sample_BHWC, coefficients.timestep, conditioning_scale
        )
        if guided:
            # Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6, in Imagen's parametrisation.
            unconditional_BHWC, conditional_BHWC = jnp.split(output_BHWC, 2)
            output_BHWC = unconditional_BHWC + guidance_scale * (conditional_BHWC - unconditional_BHWC)
        return sampler_step(plan, coefficients, state, output_BHWC), None

    start = initial_state(latents_BHWC.astype(jnp.float32))
    final, _ = jax.lax.scan(step, start, jax.tree.map(jnp.asarray, plan.coefficients))
    return final.sample


def _predict(
    defs: SamplingDefs,
    params: SamplingParams,
    prompt: Prompt,
    controlnet_cond_BHWC: jax.Array,
    sample_BHWC: jax.Array,
    timestep: jax.Array,
    conditioning_scale: float,
) -> jax.Array:
    """The UNet's output under the ControlNet's control, in float32."""
    timesteps_B = jnp.broadcast_to(timestep, sample_BHWC.shape[:1])
    with jax.named_scope("controlnet"):
        dtype = _dtype(params.controlnet)
        down_residuals, mid_residual = defs.controlnet.bind(params.controlnet)(
            sample_BHWC.astype(dtype),
            timesteps_B,
            prompt.encoder_hidden_states_BLD.astype(dtype),
            controlnet_cond_BHWC.astype(dtype),
            conditioning_scale=conditioning_scale,
            added_cond_kwargs=prompt.added_cond_kwargs,
        )
    with jax.named_scope("unet"):
        dtype = _dtype(params.unet)
        output_BHWC = defs.unet.bind(params.unet)(
            sample_BHWC.astype(dtype),
            timesteps_B,
            prompt.encoder_hidden_states_BLD.astype(dtype),
            down_block_additional_residuals=tuple(residual.astype(dtype) for residual in down_residuals),
            mid_block_additional_residual=mid_residual.astype(dtype),
            added_cond_kwargs=prompt.added_cond_kwargs,
        )
    return output_BHWC.astype(jnp.float32)


def _dtype(params: Params) -> jnp.dtype:
    return next(iter(params.values())).dtype
