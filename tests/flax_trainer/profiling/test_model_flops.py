"""Counted FLOPs against formulas, against XLA's own count, and against figures of the published models."""

import math
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_trainer.base_models import FrozenParams, ModelDefs
from flax_trainer.models import (
    ControlNetConfig,
    FlaxAutoencoderKL,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxControlNetModel,
    FlaxUNet2DConditionModel,
    UNet2DConditionConfig,
)
from flax_trainer.models.layers.compute import Compute
from flax_trainer.models.params import split
from flax_trainer.profiling.model_flops import flops_of, model_flops_per_image
from flax_trainer.random_model import ARCHITECTURES
from flax_trainer.training.step import Objective
from shared.diffusion.schedule import NoiseSchedule


def count(name: str, resolution: int, *, saves_memory: bool = False, batch: tuple[int, int] = (1, 2)) -> float:
    """Model FLOPs of an architecture whose weights exist nowhere."""
    architecture = ARCHITECTURES[name]
    compute = Compute("blockwise", tpu_convolutions=True, checkpointing="everything") if saves_memory else Compute()
    unet = FlaxUNet2DConditionModel.abstract(architecture.unet, compute=compute)
    controlnet = FlaxControlNetModel.abstract(
        ControlNetConfig.from_unet_config(UNet2DConditionConfig.from_dict(architecture.unet)), compute=compute
    )
    parts = {
        "unet": split(unet),
        "controlnet": split(controlnet),
        "vae": split(FlaxAutoencoderKL.abstract(architecture.vae)),
        "text_encoder": split(FlaxCLIPTextModel.abstract(architecture.text_encoder)),
    }
    if architecture.text_encoder_2 is not None:
        parts["text_encoder_2"] = split(FlaxCLIPTextModelWithProjection.abstract(architecture.text_encoder_2))
    defs = ModelDefs(**{part: definition for part, (definition, _) in parts.items()})
    params: dict[str, Any] = {part: values for part, (_, values) in parts.items()}
    side = resolution // 8
    shapes = {
        "pixel_values": ((resolution, resolution, 3), np.uint8),
        "conditioning_pixel_values": ((resolution, resolution, 3), np.uint8),
        "input_ids": ((77,), np.int32),
        "input_ids_2": ((77,), np.int32),
        "time_ids": ((6,), np.float32),
        "vae_noise": ((side, side, 4), np.float32),
        "noise": ((side, side, 4), np.float32),
        "timesteps": ((), np.int32),
    }
    objective = Objective(
        NoiseSchedule.from_config(architecture.scheduler), np.ones(1000, np.float32), 1.0, jnp.dtype(jnp.bfloat16)
    )
    return model_flops_per_image(
        defs,
        objective,
        params["controlnet"],
        FrozenParams(params["unet"], params["vae"], params["text_encoder"], params.get("text_encoder_2", {})),
        {name: jax.ShapeDtypeStruct((*batch, *shape), dtype) for name, (shape, dtype) in shapes.items()},
    )


def flops(function: Any, *shapes: tuple[int, ...]) -> float:
    return flops_of(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)).jaxpr)


# --- the models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "resolution", "depths", "tera"),
    [("sd15", 512, (1, 1, 1), 2.265), ("sd21", 768, (1, 1, 1), 6.263), ("sdxl", 1024, (0, 2, 10), 20.016)],
)
def test_published_models_take_what_their_layers_add_up_to(
    name: str, resolution: int, depths: tuple[int, int, int], tera: float
) -> None:
    """Forward passes, counted alone, put together by hand.

    Every layer takes as much for each of its two gradients, by its input and by its weights, as forward; the
    ControlNet needs both and the frozen decoder the first. Attention takes twice as much, for both factors of its
    products depend on the input. `depths` are the transformers' layers at the UNet's first three resolutions.
    """
    unet, controlnet, decoder = forward_passes(name, resolution)
    positions = [(resolution // 8 // shrunk) ** 2 for shrunk in (1, 2, 4)]
    attention = sum(
        3 * depth * 2 * 2 * length**2 * channels
        for depth, length, channels in zip(depths, positions, (320, 640, 1280), strict=True)
    )
    counted = count(name, resolution)
    assert counted == pytest.approx(unet + 3 * controlnet + decoder + attention, rel=3e-3)
    assert counted / 1e12 == pytest.approx(tera, abs=1e-3)


def forward_passes(name: str, resolution: int) -> tuple[float, float, float]:
    """FLOPs of the UNet, of the ControlNet and of the UNet's up blocks."""
    config = UNet2DConditionConfig.from_dict(ARCHITECTURES[name].unet)
    side = resolution // 8
    inputs = (
        jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1, 77, config.cross_attention_dim), jnp.float32),
    )
    added = {  # SDXL's; the others pass over it
        "text_embeds": jax.ShapeDtypeStruct((1, 1280), jnp.float32),
        "time_ids": jax.ShapeDtypeStruct((1, 6), jnp.float32),
    }
    condition = jax.ShapeDtypeStruct((1, resolution, resolution, 3), jnp.float32)
    unet, unet_params = split(FlaxUNet2DConditionModel.abstract(config))
    controlnet, params = split(FlaxControlNetModel.abstract(ControlNetConfig.from_unet_config(config)))

    def control(params: Any, added: Any, *arguments: Any) -> Any:
        return controlnet.bind(params)(*arguments, added_cond_kwargs=added)

    def denoise(params: Any, added: Any, *arguments: Any) -> Any:
        return unet.bind(params)(*arguments, added_cond_kwargs=added)

    whole = flops_of(jax.make_jaxpr(denoise)(unet_params, added, *inputs).jaxpr)
    program, (down, mid) = jax.make_jaxpr(control, return_shape=True)(params, added, *inputs, condition)
    # What the ControlNet has beyond a UNet's encoder: 1×1 convolutions of its results, and those of the condition.
    results = sum(2 * math.prod(residual.shape) * residual.shape[-1] for residual in (*down, mid))
    widths, sides = (3, 16, 16, 32, 32, 96, 96, 256, 320), (8, 8, 4, 4, 2, 2, 1, 1)
    condition_layers = sum(
        2 * 9 * (side * shrunk) ** 2 * before * after
        for (before, after), shrunk in zip(pairwise(widths), sides, strict=True)
    )
    copied = flops_of(program.jaxpr)
    return whole, copied, whole - (copied - results - condition_layers)


def test_saving_memory_and_batches_change_nothing() -> None:
    plain = count("tiny", 64)
    assert plain > 1e6
    assert count("tiny", 64, saves_memory=True) == plain
    assert count("tiny", 64, batch=(3, 5)) == plain


# --- single operations -----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    side=st.integers(4, 9),
    kernel=st.sampled_from([1, 3]),
    channels=st.integers(1, 4),
    outputs=st.integers(1, 4),
    stride=st.integers(1, 2),
)
def test_convolutions_and_their_gradients(side: int, kernel: int, channels: int, outputs: int, stride: int) -> None:
    """Every output element is a sum over the window, and each gradient takes as many products as the convolution."""

    def convolution(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, weight, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = ((2, side, side, channels), (kernel, kernel, channels, outputs))
    out = (side - kernel) // stride + 1
    expected = 2 * 2 * out * out * outputs * kernel * kernel * channels
    assert flops(convolution, *shapes) == expected
    weight_gradient = jax.grad(lambda weight, x: convolution(x, weight).sum())
    assert flops(weight_gradient, shapes[1], shapes[0]) == expected
    if stride == 1 and kernel == 1:
        assert flops(jax.grad(lambda x, weight: convolution(x, weight).sum()), *shapes) == expected


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_products_agree_with_xla(batch: int, rows: int, inner: int, columns: int) -> None:
    shapes = ((batch, rows, inner), (batch, inner, columns))
    expected = 2 * batch * rows * inner * columns
    assert flops(jnp.matmul, *shapes) == expected
    gradients = jax.grad(lambda a, b: jnp.sum(a @ b), argnums=(0, 1))
    assert flops(gradients, *shapes) == 2 * expected


def test_loops_branches_and_recomputation() -> None:
    square = (4, 4)
    once = 2 * 4**3

    def twice(x: jax.Array) -> jax.Array:
        return x @ x @ x

    assert flops(lambda x: jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=7)[0], square) == 7 * once
    assert flops(lambda x: jax.lax.cond(x.sum() > 0, twice, lambda x: x @ x, x), square) == 2 * once
    assert flops(jax.jit(jax.checkpoint(twice)), square) == 2 * once
    assert flops(lambda x: (x @ x, jnp.sin(x))[1], square) == 0  # nobody asks for the product
