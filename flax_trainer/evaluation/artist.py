"""Pictures of a trained ControlNet, on all local devices at once."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_trainer.base_models import COMPUTE_DTYPES, BaseModels, InitialParams, load_base_models
from flax_trainer.compilation import matmul_precision, use_compilation_cache
from flax_trainer.distributed.pmap import PmapEngine
from flax_trainer.evaluation.image_sampler import ImageSampler
from flax_trainer.models.params import HostParams, from_torch_layout, torch_shape
from shared.checkpoints.trained_params import read_trained_params
from shared.generate.pictures import Artist
from shared.generate.preparation import Job


def make_artist(job: Job) -> Artist:
    """Load the models onto the devices.

    Raises:
        UserError: weights are missing or damaged, or do not fit their configuration.
    """
    config = job.models
    use_compilation_cache(config.ccache)
    jax.config.update("jax_default_matmul_precision", matmul_precision(config))
    models, initial = load_base_models(config, job.schedule, unet=job.unet)
    engine, devices = PmapEngine(), jax.device_count()
    per_device = min(job.config.batch_size, -(-len(job.requests) // devices))
    sampler = ImageSampler(engine, models, job.prompt_inputs, job.drawing, images_per_device=per_device)
    dtype = COMPUTE_DTYPES[job.config.mixed_precision]
    # Rounded on the host: a program would otherwise do it for every batch, and the devices hold both.
    trained = initial.trained if job.checkpoint is None else _of_checkpoint(job.checkpoint, models, initial)
    params: Any = engine.place_state({name: value.astype(dtype) for name, value in trained.items()})
    frozen = engine.place_frozen(initial.frozen)
    return Artist(
        backend="flax",
        devices=f"{devices} × {jax.devices()[0].device_kind}",
        draw=partial(sampler, params, frozen),
        at_once=per_device * devices,
    )


def _of_checkpoint(checkpoint: Path, models: BaseModels, initial: InitialParams) -> HostParams:
    layouts = models.defs.trained_layouts
    shapes = {name: torch_shape(value.shape, layouts[name]) for name, value in initial.trained.items()}
    trained = read_trained_params(checkpoint, shapes)
    return {name: np.asarray(from_torch_layout(value, layouts[name])) for name, value in trained.items()}
