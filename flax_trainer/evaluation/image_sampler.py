"""Images from the weights in training, sampled on all devices as users will sample them.

Axes: R images asked for, B images at once, H W pixels, C channels, L tokens.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_trainer.base_models import BaseModels, FrozenParams, ModelConfigs
from flax_trainer.distributed.engine import Engine
from flax_trainer.evaluation.sampling import decode_latents, sample_latents
from flax_trainer.models.params import Params
from flax_trainer.training.step import ComputeParams, GatherParams, encode_captions, normalise_condition
from shared.data.tokenization import PromptInputs
from shared.diffusion.control import Control
from shared.diffusion.drawing import Drawing
from shared.diffusion.samplers import SamplerPlan, initial_latents


class Rows(NamedTuple):
    """What the images that are made at once begin with: numpy on the host, jax.Array on the devices."""

    negative: dict[str, Any]  # prompt inputs
    prompt: dict[str, Any]
    condition_BHWC: Any  # uint8
    latents_BHWC: Any


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: away from what the encoders make of the negative prompt, or from zeros."""

    scale: float
    from_zeros: bool
    control: Control


class ImageSampler:
    """Samples with placed parameters, `images_per_device` at a time on every device: one program for all calls."""

    def __init__(
        self,
        engine: Engine,
        models: BaseModels,
        prompt_inputs: PromptInputs,
        drawing: Drawing,
        *,
        images_per_device: int,
    ):
        self._prompt_inputs = prompt_inputs.of_whole_images(drawing.height, drawing.width)
        self._latent_shape = models.latent_shape(drawing.height, drawing.width)
        self.drawing = drawing
        self._rows = images_per_device * jax.device_count()
        from_zeros = drawing.negative_prompt is None and prompt_inputs.zeros_for_empty_prompt
        guidance = Guidance(drawing.guidance_scale, from_zeros, drawing.control)
        self._sample = engine.compile_for_rows(
            partial(sample_images, models, drawing.plan, guidance, engine.gather_params)
        )

    def like(self, drawing: Drawing) -> "ImageSampler":
        """For pictures that differ in their seed and the words of their negative prompt alone, by the same program."""
        other = copy.copy(self)
        other.drawing = drawing
        return other

    def __call__(
        self,
        params: Params,
        frozen: FrozenParams,
        prompts: list[str],
        conditions_RHWC: np.ndarray,
        indices: list[int] | None = None,
    ) -> np.ndarray:
        """uint8 [R,H,W,C], one image for each prompt with its condition (uint8).

        An image starts from latents that depend on the seed and its index alone (without `indices`, its row), so images
        of different steps, device counts and backends can be compared.
        """
        count = len(prompts)
        indices = list(range(count)) if indices is None else indices
        rows = [min(row, count - 1) for row in range(-(-count // self._rows) * self._rows)]
        wanted = self._prompt_inputs(prompts)
        negative_inputs = self._prompt_inputs([self.drawing.negative_prompt or ""])
        negative = {name: np.repeat(array, self._rows, axis=0) for name, array in negative_inputs.items()}
        images = []
        for start in range(0, len(rows), self._rows):
            chosen = rows[start : start + self._rows]
            batch = Rows(
                negative,
                {name: array[chosen] for name, array in wanted.items()},
                conditions_RHWC[chosen],
                initial_latents(self.drawing.seed, [indices[row] for row in chosen], self._latent_shape),
            )
            images.append(self._sample(params, frozen, batch))
        return np.concatenate(images)[:count]


def sample_images(
    models: BaseModels,
    plan: SamplerPlan,
    guidance: Guidance,
    gather_params: GatherParams,
    trained: Params,
    frozen: FrozenParams,
    rows: Rows,
) -> jax.Array:
    """uint8 images [B,H,W,C], one of each of the rows; `trained` and `frozen` as training has them."""
    negative = encode_captions(models.defs, frozen, rows.negative)
    if guidance.from_zeros:
        negative = negative.zeroed()
    dtype = next(iter(frozen.unet.values())).dtype
    latents_BHWC = sample_latents(
        models.defs,
        plan,
        ComputeParams.of(trained, frozen.unet, dtype, gather_params)._replace(more_controlnets=frozen.more_controlnets),
        encode_captions(models.defs, frozen, rows.prompt),
        negative,
        _condition_of_each(models.configs, normalise_condition(rows.condition_BHWC)),
        rows.latents_BHWC,
        guidance_scale=guidance.scale,
        control=guidance.control,
    )
    images_BHWC = decode_latents(models.defs, frozen.vae, latents_BHWC, models.configs.vae.scaling_factor)
    return jnp.round(images_BHWC * 255).astype(jnp.uint8)


def _condition_of_each(configs: ModelConfigs, condition_BHWC: jax.Array) -> list[jax.Array]:
    """What each ControlNet takes of the conditions of all, which lie side by side."""
    channels = [each.conditioning_channels for each in (configs.controlnet, *configs.more_controlnets)]
    return jnp.split(condition_BHWC, np.cumsum(channels)[:-1], axis=-1)
