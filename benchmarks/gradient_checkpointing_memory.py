"""The temporary memory that XLA reserves for one training step, with and without gradient checkpointing.

    JAX_PLATFORMS=cpu python3 -m benchmarks.gradient_checkpointing_memory --architecture sd15 \\
        [--mixed_precision bf16] [--resolution 512] [--train_batch_size 1]
        [--attention plain blockwise] [--policy none everything]

Compiles the whole step from shapes alone, for this machine's first device: no weights, nothing is run. XLA's compiler
for CPUs takes out the barriers that keep what is computed again from being computed early, so there checkpointing
saves little. For TPUs, `flax_trainer.compile_report` says it.
"""

import argparse
import itertools
import resource
import time
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from flax_trainer.base_models import FrozenParams, ModelDefs
from flax_trainer.models import (
    ControlNetConfig,
    FlaxAutoencoderKL,
    FlaxCLIPTextModel,
    FlaxControlNetModel,
    FlaxUNet2DConditionModel,
)
from flax_trainer.models.kernels.attention import AttentionKernel
from flax_trainer.models.layers.compute import CheckpointingPolicy, Compute
from flax_trainer.models.params import Params, split
from flax_trainer.random_model import ARCHITECTURES, Architecture
from flax_trainer.training.optimizer import AdamWSettings
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import Objective, make_train_step
from shared.diffusion.schedule import NoiseSchedule

NONE = "none"
DTYPES = {"no": jnp.dtype(jnp.float32), "bf16": jnp.dtype(jnp.bfloat16)}
SETTINGS = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, max_grad_norm=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=["tiny", "sd15", "sd21"], default="tiny")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--mixed_precision", choices=DTYPES, default="no")
    parser.add_argument("--attention", nargs="+", choices=get_args(AttentionKernel), default=["plain", "blockwise"])
    policies = [NONE, *get_args(CheckpointingPolicy)]
    parser.add_argument("--policy", nargs="+", choices=policies, default=policies)
    arguments = parser.parse_args()

    print(f"{'attention':<12}{'recomputed':<20}{'temporary':>12}{'of the first':>14}{'compiled in':>13}", flush=True)
    first = None
    for attention, policy in itertools.product(arguments.attention, arguments.policy):
        started = time.perf_counter()
        temporary = temporary_bytes(
            ARCHITECTURES[arguments.architecture],
            arguments.resolution,
            arguments.train_batch_size,
            DTYPES[arguments.mixed_precision],
            attention,
            None if policy == NONE else policy,
        )
        seconds = time.perf_counter() - started
        first = temporary if first is None else first
        share = f"{temporary / first:.2f}x" if first else "-"
        gib = temporary / 2**30
        print(f"{attention:<12}{policy:<20}{gib:8.3f} GiB{share:>14}{seconds:11.0f} s", flush=True)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak resident memory of compiling {peak_kib / 2**20:.2f} GiB")


def temporary_bytes(
    architecture: Architecture,
    resolution: int,
    batch_size: int,
    dtype: jnp.dtype,
    attention: AttentionKernel,
    policy: CheckpointingPolicy | None,
) -> int:
    """What XLA reserves beside a step's arguments and results: activations, gradients, parameters in `dtype`."""
    compute = Compute(attention=attention, checkpointing=policy)
    unet = FlaxUNet2DConditionModel.abstract(architecture.unet, compute=compute)
    controlnet = FlaxControlNetModel.abstract(ControlNetConfig.from_unet_config(unet.config), compute=compute)
    vae = FlaxAutoencoderKL.abstract(architecture.vae)
    controlnet_def, controlnet_params = split(controlnet)
    unet_def, unet_params = split(unet)
    vae_def, vae_params = split(vae)
    text_def, text_params = split(FlaxCLIPTextModel.abstract(architecture.text_encoder))

    defs = ModelDefs(controlnet_def, unet_def, vae_def, text_def)
    schedule = NoiseSchedule.from_config(architecture.scheduler)
    weights = np.ones(schedule.num_train_timesteps, np.float32)
    step = make_train_step(defs, Objective(schedule, weights, vae.config.scaling_factor, dtype), SETTINGS)
    arguments = (
        TrainState.create({})._replace(params=controlnet_params, mu=controlnet_params, nu=controlnet_params),
        FrozenParams(_in_dtype(unet_params, dtype), _in_dtype(vae_params, dtype), _in_dtype(text_params, dtype)),
        _abstract_batch(batch_size, resolution, resolution // vae.scale_factor),
        _shape((), jnp.float32),
    )
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA's compilers for CPU, GPU and TPU all analyse memory"
    return memory.temp_size_in_bytes


def _abstract_batch(rows: int, pixels: int, latents: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of one accumulation slice (see `shared.data.batches`)."""
    return {
        "pixel_values": _shape((1, rows, pixels, pixels, 3), jnp.uint8),
        "conditioning_pixel_values": _shape((1, rows, pixels, pixels, 3), jnp.uint8),
        "input_ids": _shape((1, rows, 77), jnp.int32),
        "vae_noise": _shape((1, rows, latents, latents, 4), jnp.float32),
        "noise": _shape((1, rows, latents, latents, 4), jnp.float32),
        "timesteps": _shape((1, rows), jnp.int32),
    }


def _in_dtype(params: Params, dtype: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: _shape(value.shape, dtype) for name, value in params.items()}


def _shape(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


if __name__ == "__main__":
    main()
