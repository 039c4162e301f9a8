"""The training step, as pure functions of the state, the frozen models and a batch.

Axes: A microbatches (gradient accumulation), B batch, H W latent height and width, C channels, L tokens, D features,
P pooled features. The batch is the contract of `shared.data.batches`: everything random in it is already drawn, so a
step draws nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_trainer.base_models import COMPUTE_DTYPES, BaseModels, FrozenParams, ModelDefs, Prompt
from flax_trainer.models import FlaxControlNetModel, FlaxUNet2DConditionModel
from flax_trainer.models.params import ModelDef, Params, cast
from flax_trainer.training.loss_scaling import unscaled_gradients
from flax_trainer.training.optimizer import AdamWSettings, Scalar, adamw_update, where_tree
from flax_trainer.training.state import TrainState
from shared.config import TrainConfig
from shared.data.tokenization import ENCODED_TEXT
from shared.diffusion.control import grades
from shared.diffusion.loss_weighting import loss_weights
from shared.diffusion.schedule import NoiseSchedule, add_noise, gather, training_target
from shared.models.trained_parts import split_trained

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, FrozenParams, Batch, Scalar], tuple[TrainState, Metrics]]
EvaluationStep = Callable[[Params, FrozenParams, Batch], jax.Array]
GatherParams = Callable[[Params, jax.typing.DTypeLike], Params]
"""Brings trained parameters, as they rest on the devices, into the form that is computed with: whole, in this dtype."""


@dataclass(frozen=True)
class Objective:
    """The loss's constants. `loss_weights` is float32 [num_train_timesteps], a weight for each timestep."""

    schedule: NoiseSchedule
    loss_weights: np.ndarray
    scaling_factor: float
    compute_dtype: jnp.dtype

    @classmethod
    def create(cls, config: TrainConfig, models: BaseModels) -> "Objective":
        """What the flags and the base model say."""
        return cls(
            schedule=models.schedule,
            loss_weights=loss_weights(models.schedule, config.snr_gamma),
            scaling_factor=models.configs.vae.scaling_factor,
            compute_dtype=jnp.dtype(COMPUTE_DTYPES[config.mixed_precision or "no"]),
        )


class ComputeParams(NamedTuple):
    """What the ControlNet and the UNet compute with, in the compute dtype."""

    controlnet: Params
    unet: Params
    more_controlnets: tuple[Params, ...] = ()  # that draw with it

    @classmethod
    def of(
        cls, trained: Params, frozen_unet: Params, dtype: jax.typing.DTypeLike, gather_params: GatherParams = cast
    ) -> "ComputeParams":
        """`trained` are a `TrainState`'s, the rest of the UNet is frozen."""
        controlnet, decoder = split_trained(gather_params(trained, dtype))
        return cls(controlnet, frozen_unet | decoder)


def make_train_step(
    models: ModelDefs,
    objective: Objective,
    settings: AdamWSettings,
    *,
    gather_params: GatherParams = cast,
    axis_name: str | None = None,
) -> TrainStep:
    """The step `(state, frozen, batch, learning_rate) → (state, metrics)`.

    Every array of `batch` has leading axes [A, B]; gradients are the mean over both and, where `axis_name` names a
    mapped axis, over devices. Metrics: `loss`, and `grad_norm` before clipping. Where one is not finite, the state
    stays as it was and only `non_finite` is set.

    In float16 the state has a loss scaler, a batch whose gradients overflow is taken again with a smaller scale, and
    `loss_scale` after the step is among the metrics.
    """
    scales_loss = objective.compute_dtype == jnp.float16

    def loss_and_grads(
        params: Params, frozen: FrozenParams, microbatch: Batch, scale: jax.Array | None
    ) -> tuple[jax.Array, Params]:
        latents_BHWC, prompt = encode_batch(models, frozen, microbatch, objective)

        def loss(params: Params) -> jax.Array:
            compute_params = ComputeParams.of(params, frozen.unet, objective.compute_dtype, gather_params)
            losses_B = per_sample_losses(models, compute_params, latents_BHWC, prompt, microbatch, objective)
            return jnp.mean(jnp.asarray(objective.loss_weights)[microbatch["timesteps"]] * losses_B)

        if scale is None:
            return jax.value_and_grad(loss)(params)

        def scaled_loss(params: Params) -> tuple[jax.Array, jax.Array]:
            value = loss(params)
            return value * scale, value

        scaled_grads, value = jax.grad(scaled_loss, has_aux=True)(params)
        return value, jax.tree.map(lambda grad: grad / scale, scaled_grads)

    def mean_over_microbatches(
        params: Params, frozen: FrozenParams, batch: Batch, scale: jax.Array | None
    ) -> tuple[jax.Array, Params]:
        microbatches = len(batch["timesteps"])
        if microbatches == 1:
            return loss_and_grads(params, frozen, {name: array[0] for name, array in batch.items()}, scale)
        if scale is not None:
            scale = scale / microbatches  # a microbatch's gradients are scaled as its share in the mean, as in PyTorch

        def add(total: tuple[jax.Array, Params], microbatch: Batch) -> tuple[tuple[jax.Array, Params], None]:
            return jax.tree.map(jnp.add, total, loss_and_grads(params, frozen, microbatch, scale)), None

        total, _ = jax.lax.scan(add, (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)), batch)
        return jax.tree.map(lambda value: value / microbatches, total)

    def train_step(
        state: TrainState, frozen: FrozenParams, batch: Batch, learning_rate: Scalar
    ) -> tuple[TrainState, Metrics]:
        def mean_of_all(scale: jax.Array | None) -> tuple[jax.Array, Params]:
            local = mean_over_microbatches(state.params, frozen, batch, scale)
            return local if axis_name is None else jax.lax.pmean(local, axis_name)

        if scales_loss:
            loss, grads, loss_scaler = unscaled_gradients(mean_of_all, state.loss_scaler, state.non_finite)
        else:
            (loss, grads), loss_scaler = mean_of_all(None), state.loss_scaler
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            non_finite = state.non_finite | ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
            updated = adamw_update(state, grads, learning_rate, settings, non_finite)
            updated = updated._replace(loss_scaler=where_tree(non_finite, state.loss_scaler, loss_scaler))
        metrics = {"loss": loss, "grad_norm": grad_norm}
        if scales_loss:
            metrics["loss_scale"] = updated.loss_scaler["scale"]
        return updated, metrics

    return train_step


def make_evaluation_step(models: ModelDefs, objective: Objective, gather_params: GatherParams = cast) -> EvaluationStep:
    """`(params, frozen, batch) → losses [B]`: the training loss of each sample, not weighted by timestep."""

    def evaluation_step(params: Params, frozen: FrozenParams, batch: Batch) -> jax.Array:
        latents_BHWC, prompt = encode_batch(models, frozen, batch, objective)
        compute_params = ComputeParams.of(params, frozen.unet, objective.compute_dtype, gather_params)
        return per_sample_losses(models, compute_params, latents_BHWC, prompt, batch, objective)

    return evaluation_step


def normalise_pixels(pixel_values: jax.Array) -> jax.Array:
    """uint8 [0, 255] → float32 [-1, 1], the VAE's range."""
    return pixel_values.astype(jnp.float32) / 127.5 - 1.0


def normalise_condition(conditioning_pixel_values: jax.Array) -> jax.Array:
    """uint8 [0, 255] → float32 [0, 1], the ControlNet's range."""
    return conditioning_pixel_values.astype(jnp.float32) / 255.0


def encode_batch(
    models: ModelDefs, frozen: FrozenParams, batch: Batch, objective: Objective
) -> tuple[jax.Array, Prompt]:
    """What the frozen encoders make of a batch: (latents float32 [B,H,W,C], encoded captions).

    A batch for SDXL has captions for both encoders, `input_ids` and `input_ids_2` int32 [B,L], and `time_ids` float32
    [B,6]: original height and width, top and left edge of the crop, target height and width.

    Images may be encoded already, `latent_mean`, `latent_std` [B,H,W,C] for `pixel_values` (of dtype uint16: the bits
    of bfloat16), and so may captions (see `encode_captions`): `frozen` may then lack the VAE or the text encoders.
    """
    if "latent_mean" in batch:
        mean_BHWC, std_BHWC = (_with_bfloat16(batch[name]) for name in ("latent_mean", "latent_std"))
    else:
        mean_BHWC, std_BHWC = encode_images(models, frozen, batch["pixel_values"])
    prompt = encode_captions(models, frozen, batch)
    sample_BHWC = mean_BHWC.astype(jnp.float32) + std_BHWC.astype(jnp.float32) * batch["vae_noise"]
    return sample_BHWC * objective.scaling_factor, prompt.astype(objective.compute_dtype)


@jax.named_scope("vae")
def encode_images(models: ModelDefs, frozen: FrozenParams, pixel_values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation [B,H,W,C] of the latents of images uint8 [B,R,R,3], in the dtype of the VAE.

    That is float32 for SDXL's own.
    """
    return models.vae.bind(frozen.vae).encode(normalise_pixels(pixel_values))


def encode_captions(models: ModelDefs, frozen: FrozenParams, prompt_inputs: Batch) -> Prompt:
    """What the text encoders make of `shared.data.tokenization.PromptInputs`, in the dtype of their parameters.

    Captions that are encoded already come as `prompt_embeds` [B,L,D] in place of `input_ids`, and for SDXL as
    `pooled_prompt_embeds` [B,P]; those of dtype uint16 are the bits of bfloat16.
    """
    if "prompt_embeds" in prompt_inputs:
        encoded = {name: _with_bfloat16(prompt_inputs[name]) for name in ENCODED_TEXT if name in prompt_inputs}
    else:
        encoded = encode_tokens(models, frozen, prompt_inputs)
    added = None
    if "pooled_prompt_embeds" in encoded:
        added = {"text_embeds": encoded["pooled_prompt_embeds"], "time_ids": prompt_inputs["time_ids"]}
    return Prompt(encoded["prompt_embeds"], added)


@jax.named_scope("text_encoder")
def encode_tokens(models: ModelDefs, frozen: FrozenParams, token_ids: Batch) -> dict[str, jax.Array]:
    """`prompt_embeds` [B,L,D] and, for SDXL, `pooled_prompt_embeds` [B,P] of `input_ids` and `input_ids_2` [B,L]."""
    text_encoder = models.text_encoder.bind(frozen.text_encoder)
    if models.text_encoder_2 is None:
        return {"prompt_embeds": text_encoder(token_ids["input_ids"])[0]}
    # Podell et al. 2023 (SDXL), section 2.1: both encoders' penultimate states side by side, the second's pooled text.
    first_BLD, _ = text_encoder(token_ids["input_ids"], penultimate=True)
    text_encoder_2 = models.text_encoder_2.bind(frozen.text_encoder_2)
    second_BLD, pooled_BP = text_encoder_2(token_ids["input_ids_2"], penultimate=True)
    return {"prompt_embeds": jnp.concatenate((first_BLD, second_BLD), axis=-1), "pooled_prompt_embeds": pooled_BP}


def _with_bfloat16(encoded: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(encoded, jnp.bfloat16) if encoded.dtype == jnp.uint16 else encoded


def per_sample_losses(
    models: ModelDefs,
    params: ComputeParams,
    latents_BHWC: jax.Array,
    prompt: Prompt,
    batch: Batch,
    objective: Objective,
) -> jax.Array:
    """Mean squared error of the ControlNet-guided prediction, float32 [B], unweighted (Ho et al. 2020, eq. 14)."""
    dtype, schedule, timesteps_B = objective.compute_dtype, objective.schedule, batch["timesteps"]
    signal_B111 = gather(jnp.asarray(schedule.sqrt_alphas_cumprod), timesteps_B)
    sigma_B111 = gather(jnp.asarray(schedule.sqrt_one_minus_alphas_cumprod), timesteps_B)
    noisy_BHWC = add_noise(latents_BHWC, batch["noise"], signal_B111, sigma_B111).astype(dtype)
    target_BHWC = training_target(schedule.prediction_type, latents_BHWC, batch["noise"], signal_B111, sigma_B111)
    condition_BHWC = normalise_condition(batch["conditioning_pixel_values"]).astype(dtype)
    prediction_BHWC = predict(models, params, noisy_BHWC, timesteps_B, prompt, condition_BHWC)
    return jnp.square(prediction_BHWC - target_BHWC).mean(axis=(1, 2, 3))


def predict(
    models: ModelDefs,
    params: ComputeParams,
    sample_BHWC: jax.Array,
    timesteps_B: jax.Array,
    prompt: Prompt,
    controlnet_cond_BHWC: jax.Array,
) -> jax.Array:
    """The UNet's output under the ControlNet's control, float32. Inputs are in the compute dtype."""
    inputs = (sample_BHWC, timesteps_B, prompt)
    residuals = control_residuals(models.controlnet, params.controlnet, *inputs, controlnet_cond_BHWC)
    return controlled_prediction(models.unet, params.unet, *inputs, residuals)


def control_residuals(
    controlnet: ModelDef[FlaxControlNetModel],
    params: Params,
    sample_BHWC: jax.Array,
    timesteps_B: jax.Array,
    prompt: Prompt,
    controlnet_cond_BHWC: jax.Array,
    *,
    conditioning_scale: float | jax.Array = 1.0,
    graded: bool = False,
) -> list[jax.Array]:
    """What a ControlNet adds to the UNet: one for each skip connection, and the mid block's.

    There may be fewer conditions than samples: they are those of the last, and the first get no control.
    `conditioning_scale` and `graded` are `shared.diffusion.control.Strength`'s.
    """
    uncontrolled = len(sample_BHWC) - len(controlnet_cond_BHWC)
    controlled = (sample_BHWC, timesteps_B, prompt)
    if uncontrolled:
        controlled = jax.tree.map(lambda array: array[uncontrolled:], controlled)
    controlled_sample_BHWC, controlled_timesteps_B, controlled_prompt = controlled
    with jax.named_scope("controlnet"):
        down, mid = controlnet.bind(params)(
            controlled_sample_BHWC,
            controlled_timesteps_B,
            controlled_prompt.encoder_hidden_states_BLD,
            controlnet_cond_BHWC,
            conditioning_scale=conditioning_scale,
            added_cond_kwargs=controlled_prompt.added_cond_kwargs,
        )
        residuals = [*down, mid]
        if graded:
            residuals = _graded(residuals)
        return _after_zeros(residuals, uncontrolled) if uncontrolled else residuals


def controlled_prediction(
    unet: ModelDef[FlaxUNet2DConditionModel],
    params: Params,
    sample_BHWC: jax.Array,
    timesteps_B: jax.Array,
    prompt: Prompt,
    residuals: list[jax.Array],
) -> jax.Array:
    """The UNet's output with what ControlNets add, float32."""
    with jax.named_scope("unet"):
        prediction_BHWC = unet.bind(params)(
            sample_BHWC,
            timesteps_B,
            prompt.encoder_hidden_states_BLD,
            down_block_additional_residuals=tuple(residuals[:-1]),
            mid_block_additional_residual=residuals[-1],
            added_cond_kwargs=prompt.added_cond_kwargs,
        )
    return prediction_BHWC.astype(jnp.float32)


def _graded(residuals: list[jax.Array]) -> list[jax.Array]:
    return [residual * factor for residual, factor in zip(residuals, grades(len(residuals)), strict=True)]


def _after_zeros(residuals: list[jax.Array], rows: int) -> list[jax.Array]:
    return [jnp.pad(residual, [(rows, 0), (0, 0), (0, 0), (0, 0)]) for residual in residuals]
