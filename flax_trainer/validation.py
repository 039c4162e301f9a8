"""Validation images during training: the weights in training, sampled as users will sample them.

Axes: N local devices, B images per device, R images, H W pixels, C channels, L tokens.
"""

import logging
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flax_trainer.base_models import BaseModels
from flax_trainer.models.functional import Params, cast
from flax_trainer.pmap_engine import shard_rows
from flax_trainer.sampling import Prompt, SamplingDefs, SamplingParams, sample_images
from flax_trainer.step import FrozenParams, ModelDefs, normalise_condition
from shared.config import TrainConfig
from shared.data.preprocessing import preprocess
from shared.data.sample import BadSampleError
from shared.data.tokenization import Tokenize
from shared.diffusion.samplers import SamplerPlan, initial_latents, unipc_plan
from shared.images import GridRow, save_grid
from shared.tracking import Tracker

logger = logging.getLogger("flax_trainer")

# What diffusers' train_controlnet.py validates with: UniPC, 20 steps, and its pipeline's default guidance.
NUM_INFERENCE_STEPS = 20
GUIDANCE_SCALE = 7.5


def validation_pairs(config: TrainConfig) -> list[tuple[Path, str]]:
    """The (condition image, prompt) pairs that `--validation_image` and `--validation_prompt` mean: one goes with all.

    Raises:
        ValueError: an image that does not exist.
    """
    images, prompts = config.validation_image or (), config.validation_prompt or ()
    count = max(len(images), len(prompts))
    missing = [image for image in images if not Path(image).is_file()]
    if missing:
        raise ValueError(f"--validation_image: there is no file {', '.join(missing)}. Give paths of existing images.")
    return list(
        zip(
            map(Path, images * count if len(images) == 1 else images),
            prompts * count if len(prompts) == 1 else prompts,
            strict=True,
        )
    )


class Validation:
    """Samples every validation pair with the ControlNet in training, writes the pictures and sends them to the tracker.

    Every device samples its share. The latents that image `index` starts from depend on the seed and the index alone,
    so pictures of different steps, device counts and backends can be compared.
    """

    def __init__(
        self,
        config: TrainConfig,
        pairs: list[tuple[Path, str]],
        models: BaseModels,
        tokenize: Tokenize,
        tracker: Tracker | None,
    ):
        """Reads the condition images.

        Raises:
            ValueError: an image cannot be read.
        """
        self._pairs = pairs
        self._conditions = [_read_condition(path, config) for path, _ in pairs]
        self._input_ids = tokenize(["", *(prompt for _, prompt in pairs)])
        self._latent_shape = models.latent_shape(config.resolution)
        self._seed = config.seed
        self._images_per_pair = config.num_validation_images
        self._folder = Path(config.output_dir) / "validation"
        self._tracker = tracker
        plan = unipc_plan(models.schedule, NUM_INFERENCE_STEPS)
        self._sample = jax.pmap(partial(_sample, models.defs, plan, models.vae_config.scaling_factor))

    def run(self, controlnet_params: Params, frozen: FrozenParams, step: int) -> None:
        """Sample with these replicated parameters; the pictures are `validation/step-{step}/N.png`."""
        folder = self._folder / f"step-{step}"
        for number, ((_, prompt), condition_HWC) in enumerate(zip(self._pairs, self._conditions, strict=True)):
            images = self._sample_pair(controlnet_params, frozen, number)
            if self._tracker is not None:
                captioned = [("condition", condition_HWC), *((f"seed {i}", image) for i, image in enumerate(images))]
                save_grid(folder / f"{number}.png", [GridRow(prompt, captioned)])
                self._tracker.images(f"validation/{number}", captioned, step)
        if self._tracker is not None:
            logger.info("Validation images of step %d are in %s", step, folder)

    def _sample_pair(self, controlnet_params: Params, frozen: FrozenParams, number: int) -> list[np.ndarray]:
        count = self._images_per_pair
        padded = -(-count // jax.local_device_count()) * jax.local_device_count()  # every device needs as many
        first = number * count
        indices = [first + min(index, count - 1) for index in range(padded)]
        images = self._sample(
            controlnet_params,
            frozen,
            shard_rows(np.repeat(self._input_ids[:1], padded, axis=0)),
            shard_rows(np.repeat(self._input_ids[1 + number : 2 + number], padded, axis=0)),
            shard_rows(np.repeat(self._conditions[number][None], padded, axis=0)),
            shard_rows(initial_latents(self._seed, indices, self._latent_shape)),
        )
        return list(np.asarray(images).reshape(padded, *images.shape[2:])[:count])


def _read_condition(path: Path, config: TrainConfig) -> np.ndarray:
    try:
        return preprocess(path, config.resolution, config.image_interpolation_mode)
    except BadSampleError as error:
        raise ValueError(f"--validation_image {path} cannot be used: {error}. Give a readable image.") from error


def _sample(
    defs: ModelDefs,
    plan: SamplerPlan,
    scaling_factor: float,
    controlnet_params: Params,
    frozen: FrozenParams,
    negative_ids_BL: jax.Array,
    prompt_ids_BL: jax.Array,
    condition_BHWC: jax.Array,
    latents_BHWC: jax.Array,
) -> jax.Array:
    """uint8 images [B,H,W,C] of one device."""
    encode = defs.text_encoder.bind(frozen.text_encoder)
    dtype = next(iter(frozen.unet.values())).dtype
    images_BHWC = sample_images(
        SamplingDefs(defs.unet, defs.controlnet, defs.vae, scaling_factor),
        plan,
        SamplingParams(frozen.unet, cast(controlnet_params, dtype), frozen.vae),
        Prompt(encode(prompt_ids_BL)[0]),
        Prompt(encode(negative_ids_BL)[0]),
        normalise_condition(condition_BHWC),
        latents_BHWC,
        guidance_scale=GUIDANCE_SCALE,
    )
    return jnp.round(images_BHWC * 255).astype(jnp.uint8)
