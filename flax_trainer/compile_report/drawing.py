"""Compiles what draws pictures for a chip of a TPU slice; each chip of a slice draws its own.

Axes: B pictures at once, H W height and width (pixels or latents), C channels.
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from flax_trainer.base_models import COMPUTE_DTYPES, BaseModels, FrozenParams, ModelConfigs, define_models
from flax_trainer.compilation import matmul_precision
from flax_trainer.compile_report.costs import Costs, costs_of
from flax_trainer.compile_report.hlo import parse_program
from flax_trainer.compile_report.kernels import kernel_flops
from flax_trainer.compile_report.report import (
    GIB,
    compiled_or_too_large,
    given_flags,
    prompt_inputs_of_shapes,
    step_shapes,
    versions,
)
from flax_trainer.compile_report.targets import Target
from flax_trainer.evaluation.image_sampler import Guidance, Rows, sample_images
from flax_trainer.models.params import cast
from flax_trainer.profiling.model_flops import computing_plainly, flops_of
from shared.config import TrainConfig
from shared.diffusion.drawing import Drawing
from shared.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class DrawingReport:
    """What the compiler says of drawing `pictures` at once on a chip; bytes and cycles are a chip's, and so are FLOPs,
    those of the models without what the chip's way to compute adds."""

    target: Target
    config: TrainConfig
    num_inference_steps: int
    models_bytes: int
    peak_bytes: int
    costs: Costs
    flops: float
    compile_seconds: float

    @property
    def pictures(self) -> int:
        """That a chip draws at once."""
        return self.config.train_batch_size

    @property
    def seconds(self) -> float:
        """For those."""
        return self.costs.cycles / (self.target.chip.clock_ghz * 1e9)

    @property
    def pictures_per_second(self) -> float:
        """Of the whole slice."""
        return self.target.chips * self.pictures / self.seconds

    @property
    def mfu(self) -> float:
        """Share of the chip's peak that products and convolutions take."""
        return self.flops / self.seconds / (self.target.chip.peak_tflops * 1e12)

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": "compiler estimate",
            "target": self.target.name,
            "flags": given_flags(self.config, generate=True),
            "chips": self.target.chips,
            "pictures_per_chip": self.pictures,
            "num_inference_steps": self.num_inference_steps,
            "estimated_cycles": self.costs.cycles,
            "cycles_by_part": self.costs.by_part,
            "cycles_by_kind": self.costs.by_kind,
            "seconds": self.seconds,
            "pictures_per_second": self.pictures_per_second,
            "mfu": self.mfu,
            "model_flops": self.flops,
            "hbm_gib": self.target.chip.hbm_gib,
            "peak_hbm_gib": self.peak_bytes / GIB,
            "models_gib": self.models_bytes / GIB,
            "compile_seconds": self.compile_seconds,
            "versions": versions(),
        }


def compile_drawing_report(
    config: TrainConfig, configs: ModelConfigs, schedule: NoiseSchedule, target: Target
) -> DrawingReport:
    """Compile what draws the pictures of a validation, and of `flax_trainer.generate` with the same settings: 20 steps
    of UniPC with `--guidance_scale`, `--train_batch_size` pictures at once.

    Raises:
        DoesNotFitError: it needs more memory than a chip has.
        UserError: the models or the flags do not fit each other.
    """
    jax.config.update("jax_default_matmul_precision", matmul_precision(config))
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be read back
    device = target.devices()[0]
    models = define_models(config, configs, schedule, device)
    drawing = Drawing.of_training(config, schedule)
    guidance = Guidance(drawing.guidance_scale, from_zeros=False, control=drawing.control)
    draw = jax.jit(partial(sample_images, models, drawing.plan, guidance, cast))
    arguments = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=SingleDeviceSharding(device)),
        _shapes(config, models, drawing, target),
    )
    traced = jax.make_jaxpr(draw)(*arguments)
    plain = dataclasses.replace(models, defs=computing_plainly(models.defs))
    started = time.perf_counter()
    compiled = compiled_or_too_large(draw.lower(*arguments))
    compile_seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    assert memory is not None, "the TPU compiler analyses memory"
    return DrawingReport(
        target,
        config,
        drawing.plan.num_inference_steps,
        sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arguments[:2])),
        memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes,
        costs_of(parse_program(compiled.as_text() or ""), kernel_flops(traced.jaxpr, target.chip.multiplier), target),
        flops_of(jax.make_jaxpr(partial(sample_images, plain, drawing.plan, guidance, cast))(*arguments).jaxpr),
        compile_seconds,
    )


def _shapes(
    config: TrainConfig, models: BaseModels, drawing: Drawing, target: Target
) -> tuple[dict[str, Any], FrozenParams, Rows]:
    """What a chip is given: the ControlNet in the compute dtype, the frozen models, and where pictures begin."""
    count, dtype = config.train_batch_size, COMPUTE_DTYPES[config.mixed_precision or "no"]
    whole = dataclasses.replace(config, sd_unlocked=False)
    state, frozen, _ = step_shapes(whole, models, target, from_cache=False)
    params = {name: jax.ShapeDtypeStruct(value.shape, dtype) for name, value in state.params.items()}
    inputs = prompt_inputs_of_shapes(config, models.configs).of_whole_images(drawing.height, drawing.width)
    prompt = inputs([""] * count)
    latents_HWC = models.latent_shape(drawing.height, drawing.width)
    rows = Rows(
        prompt,
        prompt,
        jax.ShapeDtypeStruct((count, drawing.height, drawing.width, config.control_channels), jnp.uint8),
        jax.ShapeDtypeStruct((count, *latents_HWC), jnp.float32),
    )
    return params, frozen, rows
