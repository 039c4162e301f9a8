"""Gradient checkpointing and memory-efficient attention in the training loss: the same numbers in less memory."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from flax_trainer.base_models import ModelDefs, Prompt
from flax_trainer.models import ControlNetConfig, FlaxControlNetModel, FlaxUNet2DConditionModel
from flax_trainer.models.kernels.attention import AttentionKernel
from flax_trainer.models.layers.compute import CheckpointingPolicy, Compute, checkpointed
from flax_trainer.models.params import Params, split
from flax_trainer.random_model import ARCHITECTURES
from flax_trainer.training.step import ComputeParams, Objective, per_sample_losses
from shared.diffusion.schedule import NoiseSchedule

TINY = ARCHITECTURES["tiny"]
# Many layers of one resolution, 4096 positions as in a 512 px image.
DEEP_UNET = TINY.unet | {
    "block_out_channels": [32],
    "layers_per_block": 6,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}
DEEP_SIDE = 64
SIDE, ROWS, WIDTHS = 8, 2, (4, 8)  # of latents, and of the conditioning network, which halves its input once
POLICIES: tuple[CheckpointingPolicy, ...] = get_args(CheckpointingPolicy)
Batch = dict[str, Any]
Gradients = tuple[jax.Array, Params]


class Loss:
    """The training loss of latents and text, of models that compute in a given way."""

    def __init__(
        self,
        unet: dict[str, Any],
        policy: CheckpointingPolicy | None,
        kernel: AttentionKernel,
        *,
        for_tpu: bool = False,
    ):
        compute = Compute(kernel, for_tpu, policy)
        unet_model = FlaxUNet2DConditionModel.abstract(unet, compute=compute)
        controlnet_model = FlaxControlNetModel.abstract(
            ControlNetConfig.from_unet_config(unet_model.config, conditioning_embedding_out_channels=WIDTHS),
            compute=compute,
        )
        controlnet_def, self.abstract_params = split(controlnet_model)
        unet_def, self.abstract_unet = split(unet_model)
        # The VAE and the text encoder have no part in this: their results are given.
        self.defs = ModelDefs(controlnet_def, unet_def, vae=None, text_encoder=None)  # type: ignore[arg-type]
        schedule = NoiseSchedule.from_config(TINY.scheduler)
        self.objective = Objective(schedule, np.ones(1000, np.float32), 0.18215, jnp.dtype("float32"))

    def __call__(self, params: Params, unet: Params, batch: Batch) -> jax.Array:
        prompt = Prompt(batch["text"])
        compute_params = ComputeParams(params, unet)
        return per_sample_losses(self.defs, compute_params, batch["latents"], prompt, batch, self.objective).mean()

    def gradients(self, params: Params, unet: Params, batch: Batch) -> Gradients:
        return jax.value_and_grad(self)(params, unet, batch)


def values_of(abstract: Params, seed: int) -> Params:
    """Random everywhere, zero convolutions included: otherwise the ControlNet's gradients are nearly all zero."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(value.shape, np.float32) / np.prod(value.shape[:-1]) ** 0.5)
        for name, value in abstract.items()
    }


def batch_of(side: int) -> Batch:
    rng = np.random.default_rng(1)
    return {
        "latents": rng.standard_normal((ROWS, side, side, 4), np.float32),
        "noise": rng.standard_normal((ROWS, side, side, 4), np.float32),
        "text": rng.standard_normal((ROWS, 77, TINY.unet["cross_attention_dim"]), np.float32),
        "conditioning_pixel_values": rng.integers(0, 256, (ROWS, 2 * side, 2 * side, 3), np.uint8),
        "timesteps": np.array([20, 700], np.int32),
    }


@cache
def program(policy: CheckpointingPolicy | None) -> ClosedJaxpr:
    loss = Loss(TINY.unet, policy, "plain")
    return jax.make_jaxpr(loss.gradients)(loss.abstract_params, loss.abstract_unet, batch_of(SIDE))


@cache
def kept_bytes(policy: CheckpointingPolicy | None, kernel: AttentionKernel, *, for_tpu: bool = False) -> int:
    """What the forward pass leaves in memory for the backward pass, parameters apart."""
    loss, batch = Loss(DEEP_UNET, policy, kernel, for_tpu=for_tpu), batch_of(DEEP_SIDE)
    kept = jax.eval_shape(
        lambda params, unet: jax.vjp(lambda params: loss(params, unet, batch), params)[1],
        loss.abstract_params,
        loss.abstract_unet,
    )
    parameters = {value.shape for value in (*loss.abstract_params.values(), *loss.abstract_unet.values())}
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept) if x.shape not in parameters)


@cache
def result(policy: CheckpointingPolicy | None, kernel: AttentionKernel) -> Gradients:
    loss = Loss(TINY.unet, policy, kernel)
    arguments = (values_of(loss.abstract_params, 0), values_of(loss.abstract_unet, 1), batch_of(SIDE))
    return jax.jit(loss.gradients).lower(*arguments).compile()(*arguments)


def relative_difference(ours: jax.Array, reference: jax.Array) -> float:
    return float(jnp.linalg.norm(ours - reference) / jnp.linalg.norm(reference))


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Every equation, those inside of other equations included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: isinstance(value, Jaxpr | ClosedJaxpr)):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                yield from equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def count(program: ClosedJaxpr, primitive: str) -> int:
    return sum(equation.primitive.name == primitive for equation in equations(program.jaxpr))


@pytest.mark.parametrize(
    ("policy", "kernel"), [(None, "blockwise"), ("everything", "plain"), ("all_but_products", "blockwise")]
)
def test_losses_and_gradients_stay_the_same(policy: CheckpointingPolicy | None, kernel: AttentionKernel) -> None:
    (expected_loss, expected), (loss, gradients) = result(None, "plain"), result(policy, kernel)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    assert expected.keys() == gradients.keys()
    for name, value in expected.items():
        assert float(jnp.linalg.norm(value)) > 0, name
        assert relative_difference(gradients[name], value) < 2e-5, name


def test_gradients_are_the_same_under_pmap_and_accumulation() -> None:
    """Both are ways that a step runs: a loop over slices of the batch, on every device."""
    loss = Loss(TINY.unet, "everything", "blockwise")

    def accumulated(params: Params, unet: Params, batch: Batch) -> Params:
        total, _ = jax.lax.scan(
            lambda total, rows: (jax.tree.map(jnp.add, total, loss.gradients(params, unet, rows)[1]), None),
            jax.tree.map(jnp.zeros_like, params),
            batch,
        )
        return jax.lax.pmean(jax.tree.map(lambda value: value / ROWS, total), "devices")

    mapped = jax.pmap(accumulated, "devices", in_axes=(None, None, 0), devices=jax.local_devices()[:1])
    slices = {name: value[None, :, None] for name, value in batch_of(SIDE).items()}
    gradients = mapped(values_of(loss.abstract_params, 0), values_of(loss.abstract_unet, 1), slices)
    for name, value in result(None, "plain")[1].items():
        assert relative_difference(gradients[name][0], value) < 2e-5, name


def test_the_forward_pass_keeps_a_fraction() -> None:
    none, blockwise = kept_bytes(None, "plain"), kept_bytes(None, "blockwise")
    everything, products = kept_bytes("everything", "plain"), kept_bytes("all_but_products", "plain")
    assert everything < products / 3 < none / 30
    assert blockwise < none / 5


@pytest.mark.parametrize("policy", POLICIES)
def test_convolutions_for_tpus_leave_no_more_behind(policy: CheckpointingPolicy) -> None:
    """They are sums of several, in float32, of which none is worth keeping."""
    assert kept_bytes(policy, "plain", for_tpu=True) == pytest.approx(kept_bytes(policy, "plain"), rel=0.01)


def test_a_policy_decides_what_runs_twice() -> None:
    """Convolutions are recomputed under one policy and kept under the other; normalisation is recomputed under both."""
    convolutions = {policy: count(program(policy), "conv_general_dilated") for policy in (None, *POLICIES)}
    norms = {policy: count(program(policy), "rsqrt") for policy in (None, *POLICIES)}
    assert convolutions["everything"] > convolutions["all_but_products"] == convolutions[None]
    assert norms["everything"] == norms["all_but_products"] > norms[None]


def test_nothing_is_recomputed_where_no_gradient_flows() -> None:
    """A frozen UNet whose residuals enter after its mid block: only its decoder lies on the gradient's path."""
    conditioning, controlnet_layers, decoder_layers = 1, 1 + 1 + 2, 2 + 2
    recomputed = [
        equation
        for equation in equations(program("everything").jaxpr)
        if equation.primitive.name == "remat2" and equation.params["differentiated"]
    ]
    assert len(recomputed) == conditioning + controlnet_layers + decoder_layers


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpointing_leaves_a_forward_pass_alone(policy: CheckpointingPolicy) -> None:
    x = jnp.linspace(-2, 2, 100)
    function = checkpointed(lambda x: jnp.tanh(x) * x, policy)
    np.testing.assert_array_equal(jax.jit(function)(x), jax.jit(lambda x: jnp.tanh(x) * x)(x))


def test_how_a_model_computes_is_not_in_what_it_saves(tmp_path: Path) -> None:
    unet = FlaxUNet2DConditionModel.from_config(TINY.unet)
    ways = {"plain": Compute(), "other": Compute("blockwise", tpu_convolutions=True, checkpointing="everything")}
    for way, compute in ways.items():
        controlnet = FlaxControlNetModel.from_unet(unet, conditioning_embedding_out_channels=WIDTHS, compute=compute)
        controlnet.save_pretrained(tmp_path / way)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
