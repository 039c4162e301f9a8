"""The VAE's encoder and the text encoders at work before a training, to make a cache.

Axes: B images at once, R resolution, H W C of the latents.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_trainer.base_models import (
    COMPUTE_DTYPES,
    BaseModels,
    FrozenParams,
    define_models,
    read_configs,
)
from flax_trainer.compilation import matmul_precision, use_compilation_cache
from flax_trainer.models import FlaxAutoencoderKL
from flax_trainer.text_encoding import as_stored, open_text_encoder
from flax_trainer.training.step import encode_images
from shared.config import TrainConfig
from shared.diffusion.schedule import NoiseSchedule
from shared.models.source import base_source, vae_source
from shared.prepare_data.cache.encoders import EncodedImages, Encoders, ImageEncoder
from shared.run.setup import check_resolution


def open_encoders(config: TrainConfig) -> Encoders:
    """Those of the base model, on the devices of this process.

    Raises:
        UserError: a part of it is missing or not supported.
    """
    config = dataclasses.replace(config, mixed_precision=config.mixed_precision or "no")
    configs = read_configs(config)
    check_resolution(config, configs.vae.scale_factor)
    use_compilation_cache(config.ccache)
    jax.config.update("jax_default_matmul_precision", matmul_precision(config))
    schedule = NoiseSchedule.from_source(base_source(config, "scheduler"))
    models = define_models(config, configs, schedule, jax.devices()[0])
    return Encoders(
        config=config,
        latent_shape=models.latent_shape(config.resolution),
        open_image_encoder=partial(_open_image_encoder, config, models),
        open_text_encoder=partial(open_text_encoder, config, models),
    )


def _open_image_encoder(config: TrainConfig, models: BaseModels) -> ImageEncoder:
    """`--train_batch_size` images on every device at once: what fits a training fits here."""
    dtype = COMPUTE_DTYPES[config.mixed_precision or "no"]
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), ("images",))
    whole, shared_out = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("images",)))
    _, vae = FlaxAutoencoderKL.load_params(vae_source(config), dtype=models.configs.vae_dtype(dtype))
    placed = jax.device_put(FrozenParams({}, vae, {}), whole)

    @jax.jit
    def encode(frozen: FrozenParams, pixels_BRR3: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean_BHWC, std_BHWC = encode_images(models.defs, frozen, pixels_BRR3)
        return mean_BHWC.astype(dtype), std_BHWC.astype(dtype)

    def encode_on_devices(pixels_BRR3: npt.NDArray[Any]) -> EncodedImages:
        mean_BHWC, std_BHWC = encode(placed, jax.device_put(pixels_BRR3, shared_out))
        return as_stored(np.asarray(mean_BHWC)), as_stored(np.asarray(std_BHWC))

    return ImageEncoder(config.train_batch_size * len(devices), encode_on_devices)
