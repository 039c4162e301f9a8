"""The floating-point operations that training a ControlNet takes, whatever a backend spends on top of them.

Counted are the multiplications and additions of matrix products and convolutions in the gradient of one image's loss
with respect to what is trained: the UNet's and the ControlNet's forward passes, and of their backward passes what that
gradient needs. Not counted are the frozen encoders (whose results may come from a cache), everything elementwise, and
what is computed a second time to save memory: these are the model FLOPs of Chowdhery et al. 2022 (PaLM), appendix B.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters import partial_eval

from flax_trainer.base_models import FrozenParams, ModelDefs, Prompt
from flax_trainer.models import FlaxControlNetModel, FlaxUNet2DConditionModel
from flax_trainer.models.params import split
from flax_trainer.training.step import ComputeParams, Objective, encode_batch, per_sample_losses


def model_flops_per_image(
    defs: ModelDefs, objective: Objective, params: Any, frozen: FrozenParams, batch: dict[str, Any]
) -> float:
    """FLOPs of one image in one training step; a multiplication and an addition are two.

    Only shapes and dtypes count, so all arrays may be `jax.ShapeDtypeStruct`s. Nothing is computed or compiled, but
    tracing a full-size model takes seconds.

    Args:
        defs: the models; how they compute attention and convolutions, and gradient checkpointing, do not matter.
        params: what is trained.
        frozen: what is not.
        batch: arrays with leading axes [A, B], as `BatchLoader` makes them.
    """
    image = {
        # Positions are int64, which devices get as int32; JAX warns of those that are no arrays yet.
        name: jax.ShapeDtypeStruct((1, *array.shape[2:]), jax.dtypes.canonicalize_dtype(array.dtype))
        for name, array in batch.items()
    }
    defs = computing_plainly(defs)
    latents, prompt = jax.eval_shape(partial(encode_batch, defs, objective=objective), frozen, image)

    def loss(params: Any, unet: Any, latents: jax.Array, prompt: Prompt, image: dict[str, jax.Array]) -> jax.Array:
        compute_params = ComputeParams.of(params, unet, objective.compute_dtype)
        return per_sample_losses(defs, compute_params, latents, prompt, image, objective)[0]

    return flops_of(jax.make_jaxpr(jax.grad(loss))(params, frozen.unet, latents, prompt, image).jaxpr)


def flops_of(jaxpr: Jaxpr) -> float:
    """FLOPs of the matrix products and convolutions that a function's results depend on.

    Loops count as often as they run, Pallas kernels for every block of their grid, and what is mapped over devices for
    all of them; of several branches the most expensive one counts. A loop whose end depends on its results counts once:
    how often it runs is not known before.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return total_flops(needed)


def product_flops(equation: JaxprEqn) -> float:
    """Of a `dot_general`."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)


def total_flops(jaxpr: Jaxpr, of_product: Callable[[JaxprEqn], float] = product_flops) -> float:
    """As `flops_of`, needed or not, with another count for matrix products."""
    return math.fsum(_flops(equation, of_product) for equation in jaxpr.eqns)


def _flops(equation: JaxprEqn, of_product: Callable[[JaxprEqn], float]) -> float:
    primitive = equation.primitive.name
    if primitive == "dot_general":
        return of_product(equation)
    if primitive == "conv_general_dilated":
        return _convolution(equation)
    if primitive == "pallas_call":
        blocks = math.prod(equation.params["grid_mapping"].grid)
        return blocks * total_flops(equation.params["jaxpr"], of_product)
    inner = [total_flops(jaxpr, of_product) for jaxpr in jaxprs_in_params(equation.params)]
    if primitive == "cond":
        return max(inner)
    if primitive == "shard_map":
        return equation.params["mesh"].size * math.fsum(inner)
    if primitive == "scan":
        return equation.params["length"] * math.fsum(inner)
    return math.fsum(inner)


def _convolution(equation: JaxprEqn) -> float:
    """An output element is a sum over the kernel's window and input channels.

    Where the input is spread out with zeros in between (the gradient of a strided convolution), only one in `dilation`
    elements of the window meets a number.
    """
    kernel = _shape(equation.invars[1])
    output_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    dilation = math.prod(equation.params["lhs_dilation"])
    return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) / output_channels / dilation


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def computing_plainly(defs: ModelDefs) -> ModelDefs:
    """The same models without what trades computation for memory or for a better use of the device."""
    controlnet, unet = defs.controlnet.without_values, defs.unet.without_values
    plain = FlaxControlNetModel.abstract(controlnet.config, only_mid_control=controlnet.only_mid_control)
    return replace(defs, controlnet=split(plain)[0], unet=split(FlaxUNet2DConditionModel.abstract(unet.config))[0])
