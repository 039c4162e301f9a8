"""The training step against the same training written with diffusers' and PyTorch's own parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import Jaxpr, jaxprs_in_params

from flax_trainer.base_models import BaseModels, FrozenParams, InitialParams, load_base_models
from flax_trainer.compilation import matmul_precision
from flax_trainer.training.optimizer import AdamWSettings
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import Objective, TrainStep, encode_batch, make_evaluation_step, make_train_step
from shared.config import TrainConfig
from shared.diffusion.schedule import NoiseSchedule
from tests.flax_trainer.models.unet_reference import randomise
from tests.flax_trainer.training.torch_reference import TorchReference

SETTINGS = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, max_grad_norm=0.1)
LEARNING_RATE = 1e-3
STEPS = 3


def config(base_model: Path, **changes: object) -> TrainConfig:
    return TrainConfig(pretrained_model_name_or_path=str(base_model), **changes)


def load(config: TrainConfig) -> tuple[BaseModels, InitialParams]:
    return load_base_models(config, NoiseSchedule.from_pretrained(str(config.pretrained_model_name_or_path)))


def batch_of(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of noise, [count, ...]; a step wants leading axes [accumulation slices, rows]."""
    rng = np.random.default_rng(seed)
    return {
        "pixel_values": rng.integers(0, 256, (count, 64, 64, 3), np.uint8),
        "conditioning_pixel_values": rng.integers(0, 256, (count, 64, 64, 3), np.uint8),
        "input_ids": rng.integers(0, 500, (count, 77), np.int32),
        "vae_noise": rng.standard_normal((count, 8, 8, 4), np.float32),
        "noise": rng.standard_normal((count, 8, 8, 4), np.float32),
        "timesteps": rng.integers(0, 1000, count, np.int32),
    }


def in_slices(batch: dict[str, np.ndarray], slices: int) -> dict[str, np.ndarray]:
    return {name: value.reshape(slices, -1, *value.shape[1:]) for name, value in batch.items()}


def objective(models: BaseModels, dtype: str = "float32") -> Objective:
    weights = np.ones(1000, np.float32)
    return Objective(models.schedule, weights, models.configs.vae.scaling_factor, jnp.dtype(dtype))


@pytest.fixture(scope="module")
def loaded(base_model: Path) -> tuple[BaseModels, InitialParams]:
    return load(config(base_model))


@pytest.fixture(scope="module")
def step(loaded: tuple[BaseModels, InitialParams]) -> TrainStep:
    models, _ = loaded
    return jax.jit(make_train_step(models.defs, objective(models), SETTINGS))


def relative_difference(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(ours) - reference) / max(np.linalg.norm(reference), 1e-12))


def test_a_batch_may_bring_what_the_frozen_encoders_make_of_it(
    base_model: Path, loaded: tuple[BaseModels, InitialParams]
) -> None:
    """diffusers' VAE and transformers' text encoder made it here; the losses are those of the batch of pixels."""
    models, initial = loaded
    batch = batch_of(4)
    encoded = TorchReference(base_model).in_second_form(batch)
    assert encoded.keys() == batch.keys() - {"pixel_values", "input_ids"} | {
        "latent_mean",
        "latent_std",
        "prompt_embeds",
    }
    evaluate = jax.jit(make_evaluation_step(models.defs, objective(models)))
    without_encoders = FrozenParams(initial.frozen.unet, {}, {})
    np.testing.assert_allclose(
        evaluate(initial.controlnet, without_encoders, encoded),
        evaluate(initial.controlnet, initial.frozen, batch),
        rtol=1e-5,
    )


def test_training_follows_diffusers_step_for_step(
    base_model: Path, loaded: tuple[BaseModels, InitialParams], step: TrainStep
) -> None:
    """Same start, same batches: losses, gradient norms and every parameter after three clipped AdamW steps."""
    models, initial = loaded
    reference = TorchReference(base_model)
    state = TrainState.create(reference.controlnet_params(models.defs))
    optimizer = torch.optim.AdamW(
        reference.controlnet.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )
    for index in range(STEPS):
        batch = batch_of(4, seed=index)
        state, metrics = step(state, initial.frozen, in_slices(batch, 1), np.float32(LEARNING_RATE))
        loss = reference.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(reference.controlnet.parameters(), SETTINGS.max_grad_norm)
        optimizer.step()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(grad_norm.item(), rel=1e-4)
    assert int(state.step) == STEPS
    for name, expected in reference.controlnet_params(models.defs).items():
        # Adam divides by the gradient's own size, so rounding of gradients near zero moves single weights by up to lr.
        assert relative_difference(state.params[name], expected) < 1e-3, name


def test_loss_of_step_zero_is_the_base_models(
    base_model: Path, loaded: tuple[BaseModels, InitialParams], step: TrainStep
) -> None:
    """Zero convolutions: an untrained ControlNet changes nothing, whatever the condition."""
    _, initial = loaded
    batch = batch_of(4)
    _, metrics = step(TrainState.create(initial.controlnet), initial.frozen, in_slices(batch, 1), np.float32(0))
    assert float(metrics["loss"]) == pytest.approx(
        TorchReference(base_model).loss(batch, controlled=False).item(), rel=1e-5
    )


def test_accumulated_slices_equal_one_batch(loaded: tuple[BaseModels, InitialParams], step: TrainStep) -> None:
    _, initial = loaded
    batch, state = batch_of(4), TrainState.create(initial.controlnet)
    whole, whole_metrics = step(state, initial.frozen, in_slices(batch, 1), np.float32(LEARNING_RATE))
    sliced, sliced_metrics = step(state, initial.frozen, in_slices(batch, 4), np.float32(LEARNING_RATE))
    assert float(sliced_metrics["loss"]) == pytest.approx(float(whole_metrics["loss"]), rel=1e-5)
    assert float(sliced_metrics["grad_norm"]) == pytest.approx(float(whole_metrics["grad_norm"]), rel=1e-4)
    for name, value in whole.mu.items():
        assert relative_difference(sliced.mu[name], np.asarray(value)) < 1e-4, name
    assert int(sliced.step) == int(whole.step) == 1


def test_a_non_finite_loss_freezes_the_state(loaded: tuple[BaseModels, InitialParams], step: TrainStep) -> None:
    """Later, finite batches must not move what was last good: they may already be on their way."""
    _, initial = loaded
    start = TrainState.create(initial.controlnet)
    poisoned = batch_of(4) | {"noise": np.full((4, 8, 8, 4), np.nan, np.float32)}
    bad, metrics = step(start, initial.frozen, in_slices(poisoned, 1), np.float32(LEARNING_RATE))
    assert np.isnan(float(metrics["loss"]))
    after, metrics = step(bad, initial.frozen, in_slices(batch_of(4), 1), np.float32(LEARNING_RATE))
    assert np.isfinite(float(metrics["loss"]))
    assert bool(after.non_finite)
    assert int(after.step) == 0
    for name, value in start.params.items():
        np.testing.assert_array_equal(after.params[name], value)


def test_bf16_computes_in_bf16_and_keeps_the_controlnet_in_float32(base_model: Path) -> None:
    models, initial = load(config(base_model, mixed_precision="bf16"))
    assert {value.dtype.name for value in jax.tree.leaves(initial.frozen)} == {"bfloat16"}
    bf16 = jax.jit(make_train_step(models.defs, objective(models, dtype="bfloat16"), SETTINGS))
    batch = batch_of(4)
    state, metrics = bf16(TrainState.create(initial.controlnet), initial.frozen, in_slices(batch, 1), np.float32(1e-3))
    assert {value.dtype.name for value in state.params.values()} == {"float32"}
    exact = TorchReference(base_model).loss(batch).item()
    assert float(metrics["loss"]) == pytest.approx(exact, rel=0.03)
    assert float(metrics["loss"]) != pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "precisions"),
    [
        ({}, {"HIGHEST"}),
        ({"allow_tf32": True}, {"HIGH"}),
        ({"mixed_precision": "bf16"}, {"DEFAULT", "BF16_BF16_F32"}),
        ({"mixed_precision": "bf16", "allow_tf32": True}, {"DEFAULT", "BF16_BF16_F32"}),
    ],
    ids=["float32", "tf32", "bf16", "bf16 and tf32"],
)
def test_products_are_as_precise_as_the_flags_say(
    base_model: Path, flags: dict[str, object], precisions: set[str]
) -> None:
    """In bf16 a TPU takes one pass for each."""
    configuration = config(base_model, **flags)
    models, initial = load(configuration)
    arguments = (TrainState.create(initial.controlnet), initial.frozen, in_slices(batch_of(2), 1), np.float32(0))
    step = make_train_step(models.defs, Objective.create(configuration, models), SETTINGS)
    with jax.default_matmul_precision(matmul_precision(configuration)):
        program = jax.make_jaxpr(step)(*arguments)
    assert set(precisions_of(program.jaxpr)) == precisions


def precisions_of(program: Jaxpr) -> Iterator[str]:
    for equation in program.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            precision = equation.params["precision"]
            yield (precision[0] if isinstance(precision, tuple) else precision).name
        for inner in jaxprs_in_params(equation.params):
            yield from precisions_of(inner)


def test_the_step_is_given_its_frozen_models(loaded: tuple[BaseModels, InitialParams]) -> None:
    """Frozen parameters are arguments: baked in as constants they would be compiled in and copied per device."""
    models, initial = loaded
    abstract = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype),
        (TrainState.create(initial.controlnet), initial.frozen, in_slices(batch_of(2), 1)),
    )
    jaxpr = jax.make_jaxpr(make_train_step(models.defs, objective(models), SETTINGS))(*abstract, jnp.float32(0))
    baked_in = sum(np.asarray(constant).nbytes for constant in jaxpr.consts)
    assert baked_in < sum(value.nbytes for value in initial.frozen.unet.values()) / 10
    assert isinstance(initial.frozen, FrozenParams)


# --- Stable Diffusion XL ----------------------------------------------------------------------------------------------


class XL(NamedTuple):
    models: BaseModels
    frozen: FrozenParams
    reference: TorchReference  # whose ControlNet is random in every parameter


@pytest.fixture(scope="module")
def xl(xl_model: Path) -> XL:
    models, initial = load(config(xl_model))
    reference = TorchReference(xl_model)
    randomise(reference.controlnet, seed=1)
    return XL(models, initial.frozen, reference)


def xl_batch_of(count: int) -> dict[str, np.ndarray]:
    """Texts that end in different places, images of different sizes."""
    rng, batch = np.random.default_rng(1), batch_of(count)
    batch["input_ids_2"] = rng.integers(0, 500, (count, 77), np.int32)
    batch["input_ids_2"][np.arange(count), rng.integers(5, 77, count)] = 513
    return batch | {"time_ids": rng.integers(0, 1024, (count, 6)).astype(np.float32)}


def test_xl_captions_are_encoded_as_its_pipeline_does(xl_model: Path, xl: XL) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(xl_model)
    assert isinstance(pipeline, diffusers.StableDiffusionXLPipeline)
    captions = ["a red circle", "", "a blue circle on a green background", "two"]
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    ids = {
        name: tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="np").input_ids
        for name, tokenizer in (("input_ids", pipeline.tokenizer), ("input_ids_2", pipeline.tokenizer_2))
    }
    batch = xl_batch_of(4) | ids
    _, prompt = encode_batch(xl.models.defs, xl.frozen, batch, objective(xl.models))
    assert prompt.added_cond_kwargs is not None
    assert relative_difference(prompt.encoder_hidden_states_BLD, embeds.numpy()) < 1e-5
    assert relative_difference(prompt.added_cond_kwargs["text_embeds"], pooled.numpy()) < 1e-5
    np.testing.assert_array_equal(prompt.added_cond_kwargs["time_ids"], batch["time_ids"])


@pytest.mark.parametrize("form", ["pixels and token ids", "latents and embeddings"])
def test_xl_loss_and_gradients_are_those_of_diffusers(xl: XL, form: str) -> None:
    models, frozen, reference = xl
    batch = xl_batch_of(4)
    reference.controlnet.zero_grad()
    loss = reference.loss(batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.controlnet.parameters(), SETTINGS.max_grad_norm)
    if form == "latents and embeddings":
        batch, frozen = reference.in_second_form(batch), FrozenParams(frozen.unet, {}, {})

    start = TrainState.create(reference.controlnet_params(models.defs))
    step = jax.jit(make_train_step(models.defs, objective(models), SETTINGS))
    state, metrics = step(start, frozen, in_slices(batch, 1), np.float32(LEARNING_RATE))
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    for name, gradient in reference.controlnet_gradients(models.defs).items():
        assert relative_difference(state.mu[name] / (1 - SETTINGS.beta1), gradient) < 1e-4, name
        assert not np.array_equal(state.params[name], start.params[name]), name
