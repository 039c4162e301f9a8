"""Pictures of a trained ControlNet, on all local devices at once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from flax_trainer.base_models import COMPUTE_DTYPES, BaseModels, FrozenParams, InitialParams, load_base_models
from flax_trainer.compilation import matmul_precision, use_compilation_cache
from flax_trainer.distributed.pmap import PmapEngine
from flax_trainer.evaluation.image_sampler import ImageSampler
from flax_trainer.models import ControlNetConfig, FlaxControlNetModel
from flax_trainer.models.params import HostParams, from_torch_layout, split, torch_shape
from shared.checkpoints.trained_params import read_trained_params
from shared.generate.controlnets import NamedControlNet
from shared.generate.models import NamedModels
from shared.generate.pictures import Artist, does_not_fit
from shared.generate.preparation import Commission
from shared.models.source import controlnet_source


@dataclass(frozen=True)
class PlacedModels:
    """Models on all local devices, ready to draw. `params` are the ControlNet's, and a decoder's that was trained."""

    engine: PmapEngine
    models: BaseModels
    params: Any
    frozen: FrozenParams


def place_models(named: NamedModels) -> PlacedModels:
    """Load them, as this process computes from then on: JAX's precision and cache of programs are the process's.

    Raises:
        UserError: weights are missing or damaged, or do not fit their configuration.
    """
    config = named.config
    use_compilation_cache(config.ccache)
    jax.config.update("jax_default_matmul_precision", matmul_precision(config))
    first, *more = named.controlnets
    models, initial = load_base_models(
        config, named.schedule, unet_source=named.unet, more_controlnets=named.architectures[1:]
    )
    trained = initial.trained if first.checkpoint is None else _of_checkpoint(first.checkpoint, models, initial)
    engine, dtype = PmapEngine(), COMPUTE_DTYPES[config.mixed_precision or "no"]
    # Rounded on the host: a program would otherwise do it for every batch, and the devices hold both.
    params = engine.place_state({name: value.astype(dtype) for name, value in trained.items()})
    architectures = models.configs.more_controlnets
    more_params = tuple(_params_of(*of_one, dtype) for of_one in zip(more, architectures, strict=True))
    frozen = initial.frozen._replace(more_controlnets=more_params)
    return PlacedModels(engine, models, params, engine.place_frozen(frozen))


def make_artist(job: Commission) -> Artist:
    """Load the models onto the devices.

    Raises:
        UserError: as `place_models`, or their memory is too small.
    """
    with _memory_in_words(job):
        placed, devices = place_models(job.models), jax.device_count()
    per_device = min(job.config.batch_size, -(-len(job.requests) // devices))
    sampler = ImageSampler(
        placed.engine, placed.models, job.models.prompt_inputs, job.drawing, images_per_device=per_device
    )

    def draw(prompts: list[str], conditions_RHWC: np.ndarray, indices: list[int]) -> np.ndarray:
        with _memory_in_words(job):
            return sampler(placed.params, placed.frozen, prompts, conditions_RHWC, indices)

    return Artist(
        backend="flax",
        devices=f"{devices} × {jax.devices()[0].device_kind}",
        draw=draw,
        at_once=per_device * devices,
    )


@contextmanager
def _memory_in_words(job: Commission) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise does_not_fit(job) from error
        raise


def _params_of(controlnet: NamedControlNet, architecture: ControlNetConfig, dtype: DTypeLike) -> HostParams:
    """A ControlNet's that draws with the first."""
    if controlnet.checkpoint is None:
        source = controlnet_source(controlnet.config)
        assert source is not None
        return FlaxControlNetModel.load_params(source, dtype=dtype)[1]
    definition, abstract = split(FlaxControlNetModel.abstract(architecture))
    params = _read_checkpoint(controlnet.checkpoint, abstract, definition.layouts)
    return {name: value.astype(dtype) for name, value in params.items()}


def _of_checkpoint(checkpoint: Path, models: BaseModels, initial: InitialParams) -> HostParams:
    return _read_checkpoint(checkpoint, initial.trained, models.defs.trained_layouts)


def _read_checkpoint(checkpoint: Path, expected: Mapping[str, Any], layouts: Mapping[str, str]) -> HostParams:
    """`expected` has the shapes."""
    shapes = {name: torch_shape(value.shape, layouts[name]) for name, value in expected.items()}
    trained = read_trained_params(checkpoint, shapes)
    return {name: np.asarray(from_torch_layout(value, layouts[name])) for name, value in trained.items()}
