"""Compiles the step of a configuration for a TPU slice and puts together what that tells."""

import dataclasses
import re
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_trainer.base_models import COMPUTE_DTYPES, BaseModels, FrozenParams, ModelConfigs, define_models
from flax_trainer.compilation import matmul_precision
from flax_trainer.compile_report.costs import Costs, costs_of
from flax_trainer.compile_report.hlo import parse_program
from flax_trainer.compile_report.kernels import kernel_flops
from flax_trainer.compile_report.targets import Target
from flax_trainer.compile_report.topology_engines import engine_on
from flax_trainer.distributed.engine import compile_train_step
from flax_trainer.models import (
    FlaxAutoencoderKL,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxControlNetModel,
    FlaxUNet2DConditionModel,
)
from flax_trainer.models.params import split
from flax_trainer.profiling.model_flops import flops_of, model_flops_per_image
from flax_trainer.training.eight_bit_moments import quantise
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import Objective
from shared.config import TrainConfig
from shared.config.options import FLAGS, SECRETS
from shared.config.public import public_config
from shared.data.batches import BatchLoader, BatchSpec
from shared.data.sources.circles import CirclesSource
from shared.data.tokenization import PromptInputs, Tokenize, XLInputs
from shared.diffusion.schedule import NoiseSchedule
from shared.eight_bit_moments import blocks_of
from shared.models.configs import CLIPTextConfig
from shared.models.trained_parts import is_decoder, with_unet_prefix
from shared.models.xl import sizes_of_crop
from shared.user_errors import UserError

GIB = 2**30
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax")
_DOES_NOT_FIT = re.compile("Ran out of memory (?:on HBM|in memory space hbm)")  # a core's own memory is not HBM


class DoesNotFitError(UserError):
    """The compiler found no way to run the step in a chip's memory."""


@dataclass(frozen=True)
class Memory:
    """Bytes per chip."""

    trained: int  # the ControlNet, and with --sd_unlocked the decoder; float32
    optimizer: int  # AdamW's moments, and the moving average of --use_ema
    frozen: int
    arguments: int  # all that, the batch, and what tiles add
    temporary: int  # activations, gradients, copies in the compute dtype
    peak: int


@dataclass(frozen=True)
class Report:
    """What the compiler says of one step. FLOPs, bytes and cycles are a chip's."""

    target: Target
    config: TrainConfig
    from_cache: bool
    images_per_chip: int
    global_batch_size: int
    memory: Memory
    costs: Costs
    flops: float
    bytes_accessed: float
    model_flops_per_image: float
    compile_seconds: float

    @property
    def flags(self) -> dict[str, Any]:
        return given_flags(self.config, from_cache=self.from_cache)

    @property
    def seconds(self) -> float:
        return (self.costs.cycles + self.costs.waiting_cycles) / (self.target.chip.clock_ghz * 1e9)

    @property
    def images_per_second(self) -> float:
        return self.global_batch_size / self.seconds

    @property
    def mfu(self) -> float:
        """Share of the chips' peak that the model's own FLOPs take."""
        peak = self.target.chips * self.target.chip.peak_tflops * 1e12
        return self.images_per_second * self.model_flops_per_image / peak

    def as_json(self) -> dict[str, Any]:
        memory, costs = self.memory, self.costs
        return {
            "kind": "compiler estimate",
            "target": self.target.name,
            "flags": self.flags,
            "chips": self.target.chips,
            "images_per_chip": self.images_per_chip,
            "estimated_cycles": costs.cycles,
            "collective_cycles": costs.collective_cycles,
            "waiting_cycles": costs.waiting_cycles,
            "cycles_by_part": costs.by_part,
            "cycles_by_kind": costs.by_kind,
            "loops_of_unknown_length": costs.unknown_loops,
            "step_seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "mfu": self.mfu,
            "flops": self.flops,
            "model_flops": self.model_flops_per_image * self.images_per_chip,
            "bytes_accessed": self.bytes_accessed,
            "hbm_gib": self.target.chip.hbm_gib,
            "peak_hbm_gib": memory.peak / GIB,
            "argument_gib": memory.arguments / GIB,
            "temp_gib": memory.temporary / GIB,
            "trained_gib": memory.trained / GIB,
            "optimizer_gib": memory.optimizer / GIB,
            "frozen_gib": memory.frozen / GIB,
            "compile_seconds": self.compile_seconds,
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Of what compiles."""
    return {package: metadata.version(package) for package in _PACKAGES}


def given_flags(config: TrainConfig, *, from_cache: bool = False, generate: bool = False) -> dict[str, Any]:
    """The flags that say what is compiled: those that are not at their defaults, without secrets."""
    values = dataclasses.asdict(public_config(config))
    given = {name: value for name, value in values.items() if name not in SECRETS and value != FLAGS[name].default}
    return given | ({"cached_latents": True} if from_cache else {}) | ({"generate": True} if generate else {})


def compile_report(
    config: TrainConfig, configs: ModelConfigs, schedule: NoiseSchedule, target: Target, *, from_cache: bool = False
) -> Report:
    """Compile the step that `train_flax.py` would run on every chip of a slice.

    `from_cache`: on batches in their second form, whose images and captions are encoded already.

    Raises:
        DoesNotFitError: it needs more memory than a chip has.
        UserError: the models, the flags or the slice do not fit each other.
    """
    jax.config.update("jax_default_matmul_precision", matmul_precision(config))
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be read back
    devices = target.devices()
    engine = engine_on(config, devices)
    models = define_models(config, configs, schedule, devices[0])
    state, frozen, batch = step_shapes(config, models, target, from_cache=from_cache)
    step = compile_train_step(config, models, engine)
    arguments = (*engine.shapes(state, frozen, batch), np.float32(0))
    traced = jax.make_jaxpr(step)(*arguments)

    started = time.perf_counter()
    compiled = compiled_or_too_large(step.lower(*arguments))
    compile_seconds = time.perf_counter() - started
    kernels = kernel_flops(traced.jaxpr, target.chip.multiplier)
    costs = costs_of(parse_program(compiled.as_text() or ""), kernels, target)
    analysis, images = compiled.cost_analysis(), config.train_batch_size * config.gradient_accumulation_steps
    assert analysis is not None, "the TPU compiler analyses costs"
    return Report(
        target,
        config,
        from_cache,
        images,
        images * target.chips,
        _memory(compiled, *arguments[:2]),
        costs,
        flops_of(traced.jaxpr) / target.chips,
        analysis["bytes accessed"] + costs.bytes_not_counted,
        model_flops_per_image(models.defs, Objective.create(config, models), state.params, frozen, batch),
        compile_seconds,
    )


def compiled_or_too_large(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Raises DoesNotFitError where the program needs more memory than a chip has."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if _DOES_NOT_FIT.search(str(error)):
            raise DoesNotFitError(str(error)) from error
        raise


def step_shapes(
    config: TrainConfig, models: BaseModels, target: Target, *, from_cache: bool
) -> tuple[TrainState, FrozenParams, dict[str, Any]]:
    """A step's arguments before they are placed: the state, the frozen models, a host's batch."""
    configs, dtype = models.configs, COMPUTE_DTYPES[config.mixed_precision or "no"]
    trained = split(FlaxControlNetModel.abstract(configs.controlnet))[1]
    unet = split(FlaxUNet2DConditionModel.abstract(configs.unet))[1]
    if config.sd_unlocked:
        trained = trained | with_unet_prefix({name: value for name, value in unet.items() if is_decoder(name)})
        unet = {name: value for name, value in unet.items() if not is_decoder(name)}
    state = TrainState.create({}, scales_loss=dtype == jnp.float16)._replace(
        params=trained, mu=trained, nu=trained, ema=trained if config.use_ema else {}
    )
    if config.use_8bit_adam:
        state = moments_in_eight_bits(state)
    frozen = FrozenParams(
        unet,
        split(FlaxAutoencoderKL.abstract(configs.vae))[1],
        split(FlaxCLIPTextModel.abstract(configs.text_encoder))[1],
        {}
        if configs.text_encoder_2 is None
        else split(FlaxCLIPTextModelWithProjection.abstract(configs.text_encoder_2))[1],
    )
    in_dtype = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, dtype), frozen)
    vae_dtype = configs.vae_dtype(dtype)
    in_dtype = in_dtype._replace(
        vae={name: jax.ShapeDtypeStruct(value.shape, vae_dtype) for name, value in frozen.vae.items()}
    )
    batch = _host_batch(config, models, target)
    if from_cache:
        in_dtype, batch = in_dtype._replace(vae={}), _with_images_encoded(batch)
    if from_cache or config.precompute_text:
        in_dtype = in_dtype._replace(text_encoder={}, text_encoder_2={})
        batch = _with_captions_encoded(batch, models, dtype)
    return state, in_dtype, batch


def moments_in_eight_bits(state: TrainState) -> TrainState:
    """Of shapes: the state that `--use_8bit_adam` has where this one has float32 moments."""
    large = {name: value for name, value in state.mu.items() if blocks_of(value.shape) is not None}
    stored = {name: jax.eval_shape(partial(quantise, signed=True), value) for name, value in large.items()}
    moments = state.mu | {name: codes for name, (codes, _) in stored.items()}
    scales = {name: scales for name, (_, scales) in stored.items()}
    return state._replace(mu=moments, nu=moments, mu_scales=scales, nu_scales=scales)


def _with_images_encoded(batch: dict[str, Any]) -> dict[str, Any]:
    """See `flax_trainer.training.step.encode_batch`."""
    rest = {name: array for name, array in batch.items() if name != "pixel_values"}
    return rest | {"latent_mean": batch["noise"], "latent_std": batch["noise"]}


def _with_captions_encoded(batch: dict[str, Any], models: BaseModels, dtype: Any) -> dict[str, Any]:
    """See `flax_trainer.training.step.encode_captions`."""
    first, second = models.configs.text_encoder, models.configs.text_encoder_2
    rest = {name: array for name, array in batch.items() if name not in ("input_ids", "input_ids_2")}
    features = first.hidden_size
    if second is not None:
        features += second.hidden_size
        pooled = (*batch["timesteps"].shape, second.projection_dim)
        rest["pooled_prompt_embeds"] = jax.ShapeDtypeStruct(pooled, dtype)
    return rest | {"prompt_embeds": jax.ShapeDtypeStruct((*batch["input_ids"].shape, features), dtype)}


def _host_batch(config: TrainConfig, models: BaseModels, target: Target) -> dict[str, np.ndarray]:
    """What a host of the slice would load for a step, empty."""
    loader = BatchLoader(
        CirclesSource(1, config.resolution, config.seed),  # the shapes are those of any data
        config,
        prompt_inputs_of_shapes(config, models.configs),
        BatchSpec(config.train_batch_size, target.chips, config.gradient_accumulation_steps),
        latent_shape=models.latent_shape(config.resolution),
        num_train_timesteps=models.schedule.num_train_timesteps,
        process_count=target.hosts,
    )
    batch = loader.blank()
    # Positions are int64, which devices get as int32.
    return {name: array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False) for name, array in batch.items()}


def prompt_inputs_of_shapes(config: TrainConfig, configs: ModelConfigs) -> PromptInputs:
    """Of the right shapes."""

    def tokenize_for(text_encoder: CLIPTextConfig) -> Tokenize:
        return lambda captions: np.zeros((len(captions), text_encoder.max_position_embeddings), np.int32)

    first, second = configs.text_encoder, configs.text_encoder_2
    xl = None if second is None else XLInputs(tokenize_for(second), sizes_of_crop(config.resolution))
    return PromptInputs(tokenize_for(first), xl)


def _memory(compiled: jax.stages.Compiled, state: TrainState, frozen: FrozenParams) -> Memory:
    analysis = compiled.memory_analysis()
    assert analysis is not None, "the TPU compiler analyses memory"
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        _bytes_per_chip(state.params),
        _bytes_per_chip((state.mu, state.nu, state.mu_scales, state.nu_scales, state.ema)),
        _bytes_per_chip(frozen),
        analysis.argument_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes,
    )


def _bytes_per_chip(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
