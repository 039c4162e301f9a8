"""What one block of Stable Diffusion 1.5 at 512 px takes on a TPU v4, by the estimate of the TPU's compiler.

    python3 -m benchmarks.tpu_blocks transformer --attention plain splash [--images 8] [--channels 320]
    python3 -m benchmarks.tpu_blocks resnet --images 2 --channels 640 --convolutions xla tpu
    python3 -m benchmarks.tpu_blocks conditioning --images 2 --convolutions xla tpu
    python3 -m benchmarks.tpu_blocks vae_encoder --images 2 --convolutions xla tpu

Compiled are a forward pass and, from a second one, the gradients of weights and input, in bf16 with float32 weights;
of the VAE's encoder, which is frozen, a forward pass.
No TPU is needed; `pip install 'jax[tpu]'` brings the compiler.
"""

import argparse
import itertools
import os
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from flax_trainer.compile_report.costs import costs_of
from flax_trainer.compile_report.hlo import parse_program
from flax_trainer.compile_report.kernels import kernel_flops
from flax_trainer.compile_report.targets import parse_target
from flax_trainer.models.controlnet import ControlNetConditioningEmbedding
from flax_trainer.models.layers.compute import Compute
from flax_trainer.models.layers.resnet import ResnetBlock2D, ResnetSpec
from flax_trainer.models.layers.transformer import Transformer2DModel, TransformerSpec
from flax_trainer.models.params import cast, split
from flax_trainer.models.vae import AutoencoderKLConfig, Encoder
from flax_trainer.profiling.model_flops import flops_of
from flax_trainer.random_model import ARCHITECTURES

TARGET = parse_target("v4-8")
SIDES = {320: 64, 640: 32, 1280: 16}  # of the feature maps with so many channels
TEXT_FEATURES, TIME_FEATURES = 768, 1280
CONDITIONING_WIDTHS = (16, 32, 96, 256)
PIXELS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("block", choices=["transformer", "resnet", "conditioning", "vae_encoder"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--channels", type=int, choices=SIDES, default=320)
    parser.add_argument("--attention", nargs="+", choices=["plain", "blockwise", "splash"], default=["splash"])
    parser.add_argument("--convolutions", nargs="+", choices=["xla", "tpu"], default=["tpu"])
    arguments = parser.parse_args()
    print(f"{'':<16}{'M cycles':>10}{'of peak':>10}{'GB':>8}   cycles by kind of work (compiler estimate)")
    attentions = arguments.attention if arguments.block in ("transformer", "vae_encoder") else ["plain"]
    for attention, convolutions in itertools.product(attentions, arguments.convolutions):
        measure(arguments.block, arguments.images, arguments.channels, attention, convolutions)


def measure(block: str, images: int, channels: int, attention: Any, convolutions: str) -> None:
    sharding = SingleDeviceSharding(TARGET.devices()[0])

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    y = array(images, SIDES[channels], SIDES[channels], channels)
    x, context = y, list[Any]()
    if block == "transformer":
        context = [array(images, 77, TEXT_FEATURES)]
    elif block == "resnet":
        context = [array(images, TIME_FEATURES)]
    elif block == "vae_encoder":
        x = array(images, PIXELS, PIXELS, 3)
    else:
        reduction = 2 ** (len(CONDITIONING_WIDTHS) - 1)
        x = array(images, reduction * SIDES[channels], reduction * SIDES[channels], 3)
    plain = make(block, channels, Compute())
    inputs = ({name: array(*w.shape, dtype=jnp.float32) for name, w in split(plain)[1].items()}, x, context, y)
    flops = flops_of(jax.make_jaxpr(compiled_part(plain, block))(*inputs).jaxpr)  # without filled-up zeros

    model = make(block, channels, Compute(attention, convolutions == "tpu", fused_feed_forward=convolutions == "tpu"))
    function = compiled_part(model, block)
    compiled = jax.jit(function).lower(*inputs).compile()
    kernels = kernel_flops(jax.make_jaxpr(function)(*inputs).jaxpr, TARGET.chip.multiplier)
    costs = costs_of(parse_program(compiled.as_text() or ""), kernels, TARGET)
    analysis = compiled.cost_analysis() or {}
    share = flops / (costs.cycles / (TARGET.chip.clock_ghz * 1e9)) / (TARGET.chip.peak_tflops * 1e12)
    gigabytes = (analysis["bytes accessed"] + costs.bytes_not_counted) / 1e9
    kinds = ", ".join(f"{kind} {cycles / 1e6:.2f}" for kind, cycles in costs.by_kind.items())
    label = f"{attention}, {convolutions}"
    print(f"{label:<16}{costs.cycles / 1e6:>10.2f}{share:>10.1%}{gigabytes:>8.1f}   {kinds}", flush=True)


def make(block: str, channels: int, compute: Compute) -> Any:
    """The block without values."""
    if block == "transformer":
        spec = TransformerSpec(
            compute, 8, 1, TEXT_FEATURES, 32, use_linear_projection=False, only_cross_attention=False
        )
        return nnx.eval_shape(lambda: Transformer2DModel(channels, spec))
    if block == "resnet":
        resnet = ResnetSpec(compute, time_embed_dim=TIME_FEATURES, norm_num_groups=32, norm_eps=1e-5)
        return nnx.eval_shape(lambda: ResnetBlock2D(channels, channels, resnet))
    if block == "vae_encoder":
        config = AutoencoderKLConfig.from_dict(ARCHITECTURES["sd15"].vae)
        return nnx.eval_shape(lambda: Encoder(config, compute))
    return nnx.eval_shape(lambda: ControlNetConditioningEmbedding(3, CONDITIONING_WIDTHS, channels, compute))


def compiled_part(model: Any, block: str) -> Callable[..., Any]:
    definition, _ = split(model)

    def forward(params: Any, x: jax.Array, context: Any) -> jax.Array:
        return definition.bind(cast(params, jnp.bfloat16))(x, *context)

    def forward_only(params: Any, x: jax.Array, context: Any, cotangent: jax.Array) -> jax.Array:
        return forward(params, x, context)

    def both(params: Any, x: jax.Array, context: Any, cotangent: jax.Array) -> Any:
        gradients = jax.vjp(lambda params, x: forward(params, x, context), params, x)[1](cotangent)
        # Of the conditioning network, nobody asks for the image's gradient.
        return forward(params, x, context), gradients[:1] if block == "conditioning" else gradients

    return forward_only if block == "vae_encoder" else both


if __name__ == "__main__":
    main()
