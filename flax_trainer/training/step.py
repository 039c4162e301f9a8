"""The training step, as pure functions of the state, the frozen models and a batch.

Axes: A accumulation slices, B batch, H W latent height and width, C channels, L tokens, D features, P pooled features.
The batch is the contract of `shared.data.batches`: everything random in it is already drawn, so a step draws nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_trainer.evaluation.sampling import Prompt
from flax_trainer.models import (
    FlaxAutoencoderKL,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxControlNetModel,
    FlaxUNet2DConditionModel,
)
from flax_trainer.models.params import ModelDef, Params, cast
from flax_trainer.training.loss_scaling import unscaled_gradients
from flax_trainer.training.optimizer import AdamWSettings, Scalar, adamw_update, kept_if
from flax_trainer.training.state import TrainState
from shared.diffusion.schedule import NoiseSchedule, add_noise, gather, training_target
from shared.models.trained_parts import is_decoder, prefixed, separated

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, "FrozenParams", Batch, Scalar], tuple[TrainState, Metrics]]


class FrozenParams(NamedTuple):
    """Parameters that are used and not trained, in the compute dtype; numpy until they are placed.

    With `--sd_unlocked`, `unet` lacks the decoder, which is trained.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any] = {}  # noqa: RUF012 (nothing writes to it); SDXL's


@dataclass(frozen=True)
class ModelDefs:
    """The structures of the models of a run."""

    controlnet: ModelDef[FlaxControlNetModel]
    unet: ModelDef[FlaxUNet2DConditionModel]
    vae: ModelDef[FlaxAutoencoderKL]
    text_encoder: ModelDef[FlaxCLIPTextModel]
    text_encoder_2: ModelDef[FlaxCLIPTextModelWithProjection] | None = None
    """SDXL's; the UNet and the ControlNet of a run that has one are SDXL's, too."""
    cast: Callable[[Params, jax.typing.DTypeLike], Params] = cast
    """What brings trained parameters, as they are kept, into the form that is computed with."""

    @property
    def trained_layouts(self) -> dict[str, str]:
        """The layout (see `params.py`) of whatever may be trained, by its name in `TrainState`."""
        decoder = {name: layout for name, layout in self.unet.layouts.items() if is_decoder(name)}
        return self.controlnet.layouts | prefixed(decoder)


@dataclass(frozen=True)
class Objective:
    """The loss's constants. `loss_weights` is float32 [num_train_timesteps], a weight for each timestep."""

    schedule: NoiseSchedule
    loss_weights: np.ndarray
    scaling_factor: float
    compute_dtype: jnp.dtype


def normalise_pixels(pixel_values: jax.Array) -> jax.Array:
    """uint8 [0, 255] → float32 [-1, 1], the VAE's range."""
    return pixel_values.astype(jnp.float32) / 127.5 - 1.0


def normalise_condition(conditioning_pixel_values: jax.Array) -> jax.Array:
    """uint8 [0, 255] → float32 [0, 1], the ControlNet's range."""
    return conditioning_pixel_values.astype(jnp.float32) / 255.0


def encode_batch(defs: ModelDefs, frozen: FrozenParams, batch: Batch, objective: Objective) -> tuple[jax.Array, Prompt]:
    """What the frozen encoders make of a batch: (latents float32 [B,H,W,C], encoded captions).

    A batch for SDXL has captions for both encoders, `input_ids` and `input_ids_2` int32 [B,L], and `time_ids` float32
    [B,6]: original height and width, top and left edge of the crop, target height and width.

    A batch in its second form has that already: `latent_mean`, `latent_std` [B,H,W,C] for `pixel_values`, and
    `prompt_embeds` [B,L,D] for `input_ids`; for those of SDXL, `pooled_prompt_embeds` [B,P] as well, and `time_ids` as
    before. Its run needs no VAE and no text encoder, and `frozen` may lack theirs.
    """
    dtype = objective.compute_dtype
    if "latent_mean" in batch:
        mean_BHWC, std_BHWC = batch["latent_mean"], batch["latent_std"]
        hidden_states_BLD, pooled_BP = batch["prompt_embeds"], batch.get("pooled_prompt_embeds")
    else:
        with jax.named_scope("vae"):
            pixels_BYXC = normalise_pixels(batch["pixel_values"]).astype(dtype)
            mean_BHWC, std_BHWC = defs.vae.bind(frozen.vae).encode(pixels_BYXC)
        with jax.named_scope("text_encoder"):
            hidden_states_BLD, pooled_BP = _encode_captions(defs, frozen, batch)
    sample_BHWC = mean_BHWC.astype(jnp.float32) + std_BHWC.astype(jnp.float32) * batch["vae_noise"]
    added = None if pooled_BP is None else {"text_embeds": pooled_BP, "time_ids": batch["time_ids"]}
    return sample_BHWC * objective.scaling_factor, Prompt(hidden_states_BLD.astype(dtype), added)


def _encode_captions(defs: ModelDefs, frozen: FrozenParams, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    """(hidden states [B,L,D], for SDXL the pooled vector [B,P])"""
    text_encoder = defs.text_encoder.bind(frozen.text_encoder)
    if defs.text_encoder_2 is None:
        return text_encoder(batch["input_ids"])[0], None
    # Podell et al. 2023 (SDXL), section 2.1: both encoders' penultimate states side by side, the second's pooled text.
    first_BLD, _ = text_encoder(batch["input_ids"], penultimate=True)
    second_BLD, pooled_BP = defs.text_encoder_2.bind(frozen.text_encoder_2)(batch["input_ids_2"], penultimate=True)
    return jnp.concatenate((first_BLD, second_BLD), axis=-1), pooled_BP


def computing_params(
    defs: ModelDefs, trained: Params, frozen_unet: Params, dtype: jax.typing.DTypeLike
) -> tuple[Params, Params]:
    """The parameters that the ControlNet and the UNet compute with: (the former's, the latter's), in this dtype."""
    controlnet, decoder = separated(defs.cast(trained, dtype))
    return controlnet, frozen_unet | decoder


def per_sample_losses(
    params: Params,
    frozen_unet: Params,
    latents_BHWC: jax.Array,
    prompt: Prompt,
    batch: Batch,
    defs: ModelDefs,
    objective: Objective,
) -> jax.Array:
    """Mean squared error of the ControlNet-guided prediction, float32 [B], unweighted (Ho et al. 2020, eq. 14)."""
    dtype, schedule, timesteps_B = objective.compute_dtype, objective.schedule, batch["timesteps"]
    signal_B111 = gather(jnp.asarray(schedule.sqrt_alphas_cumprod), timesteps_B)
    sigma_B111 = gather(jnp.asarray(schedule.sqrt_one_minus_alphas_cumprod), timesteps_B)
    noisy_BHWC = add_noise(latents_BHWC, batch["noise"], signal_B111, sigma_B111).astype(dtype)
    target_BHWC = training_target(schedule.prediction_type, latents_BHWC, batch["noise"], signal_B111, sigma_B111)

    controlnet_params, unet_params = computing_params(defs, params, frozen_unet, dtype)
    with jax.named_scope("controlnet"):
        down_residuals, mid_residual = defs.controlnet.bind(controlnet_params)(
            noisy_BHWC,
            timesteps_B,
            prompt.encoder_hidden_states_BLD,
            normalise_condition(batch["conditioning_pixel_values"]).astype(dtype),
            added_cond_kwargs=prompt.added_cond_kwargs,
        )
    with jax.named_scope("unet"):
        prediction_BHWC = defs.unet.bind(unet_params)(
            noisy_BHWC,
            timesteps_B,
            prompt.encoder_hidden_states_BLD,
            down_block_additional_residuals=down_residuals,
            mid_block_additional_residual=mid_residual,
            added_cond_kwargs=prompt.added_cond_kwargs,
        )
    return jnp.square(prediction_BHWC.astype(jnp.float32) - target_BHWC).mean(axis=(1, 2, 3))


def make_train_step(
    defs: ModelDefs, objective: Objective, settings: AdamWSettings, *, axis_name: str | None = None
) -> TrainStep:
    """The step `(state, frozen, batch, learning_rate) → (state, metrics)`.

    Every array of `batch` has leading axes [A, B]; gradients are the mean over both and, where `axis_name` names a
    mapped axis, over devices. Metrics: `loss`, and `grad_norm` before clipping. Where one is not finite, the state
    stays as it was and only `halted` is set.

    In float16 the state has a loss scaler, a batch whose gradients overflow is taken again with a smaller scale, and
    `loss_scale` after the step is among the metrics.
    """
    scales_loss = objective.compute_dtype == jnp.float16

    def loss_and_grads(
        params: Params, frozen: FrozenParams, slice_: Batch, scale: jax.Array | None
    ) -> tuple[jax.Array, Params]:
        latents_BHWC, prompt = encode_batch(defs, frozen, slice_, objective)

        def loss(params: Params) -> jax.Array:
            losses_B = per_sample_losses(params, frozen.unet, latents_BHWC, prompt, slice_, defs, objective)
            return jnp.mean(jnp.asarray(objective.loss_weights)[slice_["timesteps"]] * losses_B)

        if scale is None:
            return jax.value_and_grad(loss)(params)

        def scaled_loss(params: Params) -> tuple[jax.Array, jax.Array]:
            value = loss(params)
            return value * scale, value

        scaled_grads, value = jax.grad(scaled_loss, has_aux=True)(params)
        return value, jax.tree.map(lambda grad: grad / scale, scaled_grads)

    def mean_over_slices(
        params: Params, frozen: FrozenParams, batch: Batch, scale: jax.Array | None
    ) -> tuple[jax.Array, Params]:
        slices = len(batch["timesteps"])
        if slices == 1:
            return loss_and_grads(params, frozen, {name: array[0] for name, array in batch.items()}, scale)
        if scale is not None:
            scale = scale / slices  # a slice's gradients are scaled as its share in the mean, as in PyTorch
        total, _ = jax.lax.scan(
            lambda total, slice_: (jax.tree.map(jnp.add, total, loss_and_grads(params, frozen, slice_, scale)), None),
            (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)),
            batch,
        )
        return jax.tree.map(lambda value: value / slices, total)

    def train_step(
        state: TrainState, frozen: FrozenParams, batch: Batch, learning_rate: Scalar
    ) -> tuple[TrainState, Metrics]:
        def mean_of_all(scale: jax.Array | None) -> tuple[jax.Array, Params]:
            local = mean_over_slices(state.params, frozen, batch, scale)
            return local if axis_name is None else jax.lax.pmean(local, axis_name)

        if scales_loss:
            loss, grads, loss_scaler = unscaled_gradients(mean_of_all, state.loss_scaler, state.halted)
        else:
            (loss, grads), loss_scaler = mean_of_all(None), state.loss_scaler
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            halted = state.halted | ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
            updated = adamw_update(state, grads, learning_rate, settings, halted)
            updated = updated._replace(loss_scaler=kept_if(halted, state.loss_scaler, loss_scaler))
        metrics = {"loss": loss, "grad_norm": grad_norm}
        if scales_loss:
            metrics["loss_scale"] = updated.loss_scaler["scale"]
        return updated, metrics

    return train_step


def make_evaluation_step(defs: ModelDefs, objective: Objective) -> Callable[[Params, FrozenParams, Batch], jax.Array]:
    """`(params, frozen, batch) → losses [B]`: the training loss of each sample, not weighted by timestep."""

    def evaluation_step(params: Params, frozen: FrozenParams, batch: Batch) -> jax.Array:
        latents_BHWC, prompt = encode_batch(defs, frozen, batch, objective)
        return per_sample_losses(params, frozen.unet, latents_BHWC, prompt, batch, defs, objective)

    return evaluation_step
