"""The training step of diffusers 0.39's `train_controlnet_flax.py`, compiled for a TPU: the other side of a comparison.

`benchmarks.tpu_step_against_diffusers` runs this in an environment of its own that has diffusers==0.39.0, the last
version with Flax models. It is what the script computes with --mixed_precision bf16 and a new ControlNet: all
parameters are float32, the frozen models compute in bfloat16, the ControlNet, made without a dtype, in float32.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax
from diffusers import FlaxAutoencoderKL, FlaxControlNetModel, FlaxDDPMScheduler, FlaxUNet2DConditionModel
from flax.training.train_state import TrainState
from transformers import CLIPTextConfig, FlaxCLIPTextModel

from flax_trainer.compile_report.costs import costs_of
from flax_trainer.compile_report.hlo import parse_program
from flax_trainer.compile_report.targets import parse_target

FROM_UNET = (
    *("in_channels", "down_block_types", "only_cross_attention", "block_out_channels", "layers_per_block"),
    *("attention_head_dim", "cross_attention_dim", "use_linear_projection", "flip_sin_to_cos", "freq_shift"),
)
TOKENS = 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=Path, required=True, help="JSON: the parts' configurations")
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--resolution", type=int, required=True)
    arguments = parser.parse_args()
    target = parse_target("v4-8")
    step, shapes = train_step(json.loads(arguments.architecture.read_text()), arguments.images, arguments.resolution)
    started = time.perf_counter()
    compiled = jax.pmap(step, "batch", devices=target.devices()[:1], donate_argnums=0).lower(*shapes).compile()
    seconds = time.perf_counter() - started
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    costs = costs_of(parse_program(compiled.as_text()), {}, target)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(
        json.dumps(
            {
                "estimated_cycles": costs.cycles,
                "cycles_by_kind": costs.by_kind,
                "bytes_accessed": analysis["bytes accessed"] + costs.bytes_not_counted,
                "peak_hbm_gib": (memory.argument_size_in_bytes + results + memory.temp_size_in_bytes) / 2**30,
                "compile_seconds": seconds,
            }
        )
    )


def train_step(architecture: dict[str, Any], images: int, resolution: int) -> tuple[Any, Any]:
    """The step of one device, and the shapes of its arguments with an axis of one device in front."""
    unet = FlaxUNet2DConditionModel.from_config(architecture["unet"], dtype=jnp.bfloat16)
    vae = FlaxAutoencoderKL.from_config(architecture["vae"], dtype=jnp.bfloat16)
    text_config = CLIPTextConfig(**architecture["text_encoder"])
    text_encoder = FlaxCLIPTextModel(text_config, dtype=jnp.bfloat16, _do_init=False)
    controlnet = FlaxControlNetModel(**{name: unet.config[name] for name in FROM_UNET})
    scheduler = FlaxDDPMScheduler.from_config(architecture["scheduler"])
    schedule = scheduler.create_state()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=1e-2))

    def loss_of(params: Any, unet_params: Any, text_params: Any, vae_params: Any, batch: Any, key: Any) -> jax.Array:
        encoded = vae.apply({"params": vae_params}, batch["pixel_values"], method=vae.encode)
        latents = encoded.latent_dist.sample(key).transpose(0, 3, 1, 2) * vae.config.scaling_factor
        noise_key, timestep_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, latents.shape)
        timesteps = jax.random.randint(timestep_key, (len(latents),), 0, scheduler.config.num_train_timesteps)
        noisy = scheduler.add_noise(schedule, latents, noise, timesteps)
        text = text_encoder(batch["input_ids"], params=text_params, train=False)[0]
        down_residuals, mid_residual = controlnet.apply(
            {"params": params},
            noisy,
            timesteps,
            text,
            batch["conditioning_pixel_values"],
            train=True,
            return_dict=False,
        )
        residuals = {
            "down_block_additional_residuals": down_residuals,
            "mid_block_additional_residual": mid_residual,
        }
        prediction = unet.apply({"params": unet_params}, noisy, timesteps, text, **residuals).sample
        return jnp.mean((noise - prediction) ** 2)

    def step(state: TrainState, frozen: tuple[Any, Any, Any], batch: Any, key: Any) -> tuple[TrainState, Any, Any]:
        sample_key, next_key = jax.random.split(key)
        loss, grads = jax.value_and_grad(loss_of)(state.params, *frozen, batch, sample_key)
        grads = jax.lax.pmean(grads, "batch")
        metrics = {"loss": jax.lax.pmean(loss, "batch"), "l2_grads": optax.tree.norm(grads)}
        return state.apply_gradients(grads=grads), metrics, next_key

    def arguments(key: jax.Array) -> Any:
        params = controlnet.init_weights(key)
        state = TrainState.create(apply_fn=None, params=params, tx=optimizer)
        frozen = (
            unet.init_weights(key),
            text_encoder.init_weights(key, (1, TOKENS)),
            vae.init_weights(key),
        )
        pixels = jnp.zeros((images, 3, resolution, resolution))
        captions = jnp.zeros((images, TOKENS), jnp.int32)
        return state, frozen, {"pixel_values": pixels, "conditioning_pixel_values": pixels, "input_ids": captions}, key

    shapes = jax.eval_shape(arguments, jax.random.key(0, impl="threefry2x32"))
    return step, jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), shapes)


if __name__ == "__main__":
    main()
