"""The PyTorch training step against diffusers' own loop and against the Flax step."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_trainer.base_models import load_base_models as load_flax_models
from flax_trainer.models.params import from_torch_layout, to_torch_layout
from flax_trainer.training.optimizer import AdamWSettings
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import Objective as FlaxObjective
from flax_trainer.training.step import make_train_step
from shared.diffusion.loss_weighting import min_snr_weights
from tests.torch_trainer.tiny_training import (
    Changes,
    DiffusersTraining,
    Training,
    batch_of,
    relative_difference,
    schedule_of,
    slice_of,
    training_of,
)
from torch_trainer.distributed import placement

LEARNING_RATES = (1e-3, 2e-4, 3e-3)
EPSILON, VELOCITY, SAMPLE = ({"prediction_type": name} for name in ("epsilon", "v_prediction", "sample"))
ZERO_TERMINAL = {"rescale_betas_zero_snr": True}
FLOAT16_MAX = torch.finfo(torch.float16).max


def snapshot(training: Training) -> dict[str, torch.Tensor]:
    """Copies of every weight and moment."""
    params, optimizer, average = training.state.tensors()
    named = {f"{kind} {name}": value for name, kinds in optimizer.items() for kind, value in kinds.items()}
    named |= {f"average {name}": value for name, value in average.items()}
    return {name: value.clone() for name, value in (params | named).items()}


def assert_unchanged(before: dict[str, torch.Tensor], training: Training) -> None:
    after = snapshot(training)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


# --- the same training as diffusers' ---------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize(
    ("scheduler", "snr_gamma"), [(EPSILON, None), (EPSILON, 5.0), (VELOCITY, None), (VELOCITY, 5.0), (SAMPLE, None)]
)
def test_training_follows_diffusers_step_for_step(
    base_model: Path, scheduler: Changes, snr_gamma: float | None, slices: int
) -> None:
    """Losses, gradient norms and every parameter over three clipped steps of changing learning rates."""
    training = training_of(
        base_model, scheduler=scheduler, snr_gamma=snr_gamma, gradient_accumulation_steps=slices, max_grad_norm=0.02
    )
    reference = DiffusersTraining(base_model, training.controlnet, scheduler)
    batches = [(batch_of(4, seed, slices), rate) for seed, rate in enumerate(LEARNING_RATES)]
    expected_figures = reference.train(iter(batches), training.config)
    for (batch, rate), (loss, norm) in zip(batches, expected_figures, strict=True):
        assert norm > 0.03, "nothing was clipped"
        given_loss, given_norm = training.step(batch, rate)
        assert given_loss == pytest.approx(loss, rel=1e-5)
        assert given_norm == pytest.approx(norm, rel=1e-4)
    params = training.state.params()
    for name, expected in reference.controlnet.named_parameters():
        assert relative_difference(params[name], expected.detach()) < 1e-4, name


@pytest.mark.parametrize(("scheduler", "snr_gamma"), [(EPSILON, None), (VELOCITY, 5.0)])
def test_xl_training_follows_diffusers_step_for_step(
    xl_model: Path, scheduler: Changes, snr_gamma: float | None
) -> None:
    training = training_of(xl_model, scheduler=scheduler, snr_gamma=snr_gamma, max_grad_norm=0.02)
    reference = DiffusersTraining(xl_model, training.controlnet, scheduler)
    batches = [(batch_of(2, seed, xl=True), rate) for seed, rate in enumerate(LEARNING_RATES)]
    expected_figures = reference.train(iter(batches), training.config)
    for (batch, rate), (loss, norm) in zip(batches, expected_figures, strict=True):
        assert training.step(batch, rate) == pytest.approx((loss, norm), rel=1e-4)
    params = training.state.params()
    for name, expected in reference.controlnet.named_parameters():
        assert relative_difference(params[name], expected.detach()) < 1e-4, name


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("scheduler", [EPSILON, VELOCITY, SAMPLE], ids=lambda changes: changes["prediction_type"])
def test_min_snr_weighs_every_sample_by_its_own_timestep(base_model: Path, scheduler: Changes, count: int) -> None:
    """At any batch size: weights of shape [B] once met losses of another shape there."""
    training = training_of(base_model, scheduler=scheduler, snr_gamma=5.0)
    timesteps = np.array([[10, 900, 100, 500, 300, 1, 700, 40]], np.int32)[
        :, :count
    ]  # SNR from far above 5 to far below
    batch = batch_of(count) | {"timesteps": timesteps}
    only_slice = slice_of(batch, 0)
    reference = DiffusersTraining(base_model, training.controlnet, scheduler)
    expected = reference.loss(only_slice, snr_gamma=5.0).item()
    assert expected != pytest.approx(reference.loss(only_slice).item(), rel=1e-2)
    assert training.step(batch, 0.0)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("scheduler", [EPSILON, VELOCITY, SAMPLE], ids=lambda changes: changes["prediction_type"])
def test_pure_noise_at_the_last_timestep_gives_finite_figures(
    base_model: Path, scheduler: Changes, snr_gamma: float | None
) -> None:
    """With zero terminal SNR, where diffusers' formula for the noise divides nothing by nothing."""
    training = training_of(base_model, scheduler=scheduler | ZERO_TERMINAL, snr_gamma=snr_gamma)
    assert training.train_step.objective.signal[-1] == 0
    batch = batch_of(2) | {"timesteps": np.array([[999, 500]], np.int32)}
    reference = None
    if snr_gamma is None or scheduler == VELOCITY:
        diffusers_training = DiffusersTraining(base_model, training.controlnet, scheduler | ZERO_TERMINAL)
        reference = diffusers_training.loss(slice_of(batch, 0), snr_gamma=snr_gamma)
    loss, norm = training.step(batch, 1e-3)
    assert math.isfinite(loss)
    assert 0 < norm < math.inf
    if reference is not None:
        assert loss == pytest.approx(reference.item(), rel=1e-4)


@pytest.mark.parametrize("scheduler", [EPSILON, VELOCITY], ids=lambda changes: changes["prediction_type"])
def test_loss_of_step_zero_is_the_base_models(base_model: Path, scheduler: Changes) -> None:
    training = training_of(base_model, awake=False, scheduler=scheduler)
    batch = batch_of(4)
    reference = DiffusersTraining(base_model, training.controlnet, scheduler)
    alone = reference.loss(slice_of(batch, 0), controlled=False)
    assert training.step(batch, 0.0)[0] == pytest.approx(alone.item(), rel=1e-6)


def test_accumulated_slices_equal_one_batch(base_model: Path) -> None:
    figures, gradients = [], []
    for slices in (1, 2, 4):
        training = training_of(base_model, gradient_accumulation_steps=slices, max_grad_norm=math.inf)
        figures.append(training.step(batch_of(4, slices=slices), 1e-3))
        gradients.append(training.gradients())
    for index in (1, 2):
        assert figures[index] == pytest.approx(figures[0], rel=1e-5)
        for name, expected in gradients[0].items():
            assert relative_difference(gradients[index][name], expected) < 1e-4, name


def test_frozen_models_stay_as_they_are(base_model: Path) -> None:
    training = training_of(base_model)
    frozen = (training.models.unet, training.models.vae, training.models.text_encoder)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in frozen]
    training.step(batch_of(2), 1e-2)
    for model, values in zip(frozen, before, strict=True):
        assert all(param.grad is None for param in model.parameters())
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


# --- the same numbers as Flax ----------------------------------------------------------------------------------------


def test_gradients_and_the_step_are_those_of_flax(base_model: Path) -> None:
    training = training_of(base_model, scheduler=VELOCITY, snr_gamma=5.0, max_grad_norm=1e6)
    config = training.config
    schedule = schedule_of(base_model, VELOCITY)
    models, initial = load_flax_models(config, schedule)
    layouts = models.defs.controlnet.layouts
    start = {name: from_torch_layout(value.numpy(), layouts[name]) for name, value in training.state.params().items()}
    weights = min_snr_weights(schedule, 5.0)
    step = make_train_step(
        models.defs,
        FlaxObjective(schedule, weights, models.configs.vae.scaling_factor, jnp.dtype("float32")),
        AdamWSettings(config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.adam_weight_decay, 1e6),
    )
    batch = batch_of(4)
    state, metrics = jax.jit(step)(
        TrainState.create({name: np.array(value) for name, value in start.items()}),
        initial.frozen,
        batch,
        np.float32(1e-3),
    )
    loss, norm = training.step(batch, 1e-3)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    params, moments, _ = training.state.tensors()
    assert params.keys() == state.params.keys()
    for name in params:
        for kind, flax_moment in (("exp_avg", state.mu), ("exp_avg_sq", state.nu)):
            expected = to_torch_layout(np.asarray(flax_moment[name]), layouts[name])
            assert relative_difference(moments[name][kind], expected) < 1e-4, (kind, name)
        # Adam divides by the gradient's own size, so rounding near zero moves single weights by up to the rate.
        expected = to_torch_layout(np.asarray(state.params[name]), layouts[name])
        assert relative_difference(params[name], expected) < 1e-3, name


# --- memory and precision --------------------------------------------------------------------------------------------


def test_gradient_checkpointing_computes_twice_and_changes_nothing(base_model: Path) -> None:
    results = {}
    for checkpointing in (False, True):
        training = training_of(base_model, gradient_checkpointing=checkpointing, max_grad_norm=math.inf)
        passes: list[str] = []
        for model in (training.controlnet, training.models.unet):
            model.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, seen=passes: seen.append("pass"))
        figures = training.step(batch_of(4), 1e-3)
        results[checkpointing] = (figures, training.gradients(), len(passes))
    (plain, plain_gradients, plain_passes), (less_memory, gradients, passes) = results[False], results[True]
    assert plain_passes == 2
    assert passes > plain_passes, "nothing was computed again"
    assert less_memory == pytest.approx(plain, rel=1e-6)
    for name, expected in plain_gradients.items():
        assert relative_difference(gradients[name], expected) < 1e-6, name


def test_bf16_computes_in_bf16_and_keeps_the_controlnet_in_float32(base_model: Path) -> None:
    batch = batch_of(4)
    exact, _ = training_of(base_model).step(batch, 1e-3)
    training = training_of(base_model, mixed_precision="bf16")
    frozen = (training.models.unet, training.models.vae, training.models.text_encoder)
    assert {param.dtype for model in frozen for param in model.parameters()} == {torch.bfloat16}
    dtypes: list[torch.dtype] = []
    training.controlnet.mid_block.resnets[0].conv1.register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    rounded, norm = training.step(batch, 1e-3)
    assert dtypes == [torch.bfloat16]
    assert {value.dtype for value in snapshot(training).values()} == {torch.float32}
    assert rounded == pytest.approx(exact, rel=0.03)
    assert rounded != pytest.approx(exact, rel=1e-6)
    assert math.isfinite(norm)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_feature_maps_may_lie_either_way(
    base_model: Path, monkeypatch: pytest.MonkeyPatch, mixed_precision: str
) -> None:
    """Channels last, or first where the device's GroupNorm would copy them into that order."""
    figures = {}
    for keeps in (True, False):
        monkeypatch.setattr(placement, "_group_norm_keeps_channels_last", lambda device, keeps=keeps: keeps)
        training = training_of(base_model, mixed_precision=mixed_precision)
        formats = set()
        for model in (training.models.vae.encoder, training.controlnet, training.models.unet):
            model.conv_in.register_forward_hook(
                lambda module, inputs, output, seen=formats: seen.add(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                    and output.is_contiguous(memory_format=torch.channels_last)
                )
            )
        figures[keeps] = training.step(batch_of(2), 1e-3)
        assert formats == {keeps}
    assert figures[True] == pytest.approx(figures[False], rel=1e-5 if mixed_precision == "no" else 2e-2)


# --- what is not finite ----------------------------------------------------------------------------------------------


def _poison(training: Training) -> None:
    """Gradients that are infinite although the loss is not."""
    next(training.controlnet.parameters()).register_hook(lambda gradient: torch.full_like(gradient, math.inf))


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(base_model: Path, what: str, slices: int) -> None:
    training = training_of(base_model, gradient_accumulation_steps=slices)
    training.step(batch_of(4, slices=slices), 1e-3)
    before = snapshot(training)
    batch = batch_of(4, seed=1, slices=slices)
    if what == "loss":
        batch["noise"][-1, -1] = np.nan
    else:
        _poison(training)
    loss, norm = training.step(batch, 1e-3)
    assert math.isnan(loss) == (what == "loss")
    assert not math.isfinite(norm)
    assert_unchanged(before, training)


@pytest.mark.parametrize("option", [{}, {"use_ema": True}, {"use_8bit_adam": True}], ids=["adamw", "ema", "8 bit"])
def test_steps_that_were_on_their_way_change_nothing_either(base_model: Path, option: dict[str, Any]) -> None:
    """Whether the device decides or the host: what is saved after such a step is what was good before it."""
    training = training_of(base_model, **option)
    training.step(batch_of(2), 1e-3)
    before = snapshot(training)
    spoiled = batch_of(2, seed=1)
    spoiled["noise"][0, 0] = np.inf
    results = [training.train_step(batch, 1e-3) for batch in (spoiled, batch_of(2, seed=2))]
    assert [math.isfinite(result.read()[0]) for result in results] == [False, True]
    assert_unchanged(before, training)


def test_the_device_decides_for_adamw(base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the step is looked at before it is read: a GPU would be waited for."""
    training = training_of(base_model, use_ema=True)
    batch = batch_of(2)
    looked_at: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, method=method, name=name: (looked_at.append(name), method(self))[1]
        )
    result = training.train_step(batch, 1e-3)
    assert looked_at == []
    result.read()
    assert looked_at == ["tolist"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_do_not_outlive_their_step(base_model: Path, set_to_none: bool) -> None:
    training = training_of(base_model, set_grads_to_none=set_to_none)
    training.step(batch_of(2), 0.0)
    gradients = [param.grad for param in training.controlnet.parameters()]
    if set_to_none:
        assert gradients == [None] * len(gradients)
    else:
        assert not any(gradient.any() for gradient in gradients)


# --- fp16's loss scale -----------------------------------------------------------------------------------------------
# CPUs have no fp16, so the scaler is put beside float32 models, and gradients overflow where fp16's would.


def _with_loss_scale(training: Training, scale: float) -> Training:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2000)
    training.accelerator.scaler = scaler
    training.accelerator.native_amp = True
    training.accelerator.state._mixed_precision = "fp16"
    optimizer = training.accelerator.prepare_optimizer(training.optimizer.optimizer)
    training.accelerator._optimizers = [optimizer]
    training.optimizer = training.train_step.optimizer = optimizer
    return training


def _overflow_as_fp16_does(training: Training) -> None:
    for param in training.controlnet.parameters():
        param.register_hook(lambda gradient: torch.where(gradient.abs() > FLOAT16_MAX, math.inf, gradient))


@pytest.mark.parametrize("slices", [1, 2])
def test_a_loss_scale_too_high_takes_the_same_batch_again(base_model: Path, slices: int) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": slices, "max_grad_norm": 0.02}
    batches = [batch_of(4, seed, slices) for seed in (0, 1)]
    unscaled = training_of(base_model, **options)
    largest = 0.0

    def remember(gradient: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, gradient.abs().max().item())

    for param in unscaled.controlnet.parameters():
        param.register_hook(remember)
    expected = [unscaled.step(batches[0], 1e-3)]
    fits = 2.0 ** math.floor(math.log2(FLOAT16_MAX / largest))
    expected.append(unscaled.step(batches[1], 1e-4))

    scaled = _with_loss_scale(training_of(base_model, **options), 4 * fits)
    _overflow_as_fp16_does(scaled)
    assert scaled.step(batches[0], 1e-3) == pytest.approx(expected[0], rel=1e-6)
    assert scaled.accelerator.scaler.get_scale() == fits, "the batch was not taken three times"
    scaled.accelerator.scaler.update(new_scale=1.0)  # of the other batch's gradients nothing is known
    assert scaled.step(batches[1], 1e-4) == pytest.approx(expected[1], rel=1e-5)
    assert {float(kinds["step"]) for kinds in scaled.optimizer.state.values()} == {2.0}
    after = snapshot(scaled)
    for name, value in snapshot(unscaled).items():
        assert relative_difference(after[name], value) < 1e-5, name


def test_a_loss_scale_that_cannot_fall_further_ends_in_a_figure_that_is_not_finite(base_model: Path) -> None:
    training = training_of(base_model)
    training.step(batch_of(4), 1e-3)
    before = snapshot(training)
    _with_loss_scale(training, 8.0)
    _poison(training)
    loss, norm = training.step(batch_of(4, seed=1), 1e-3)
    assert math.isfinite(loss)
    assert not math.isfinite(norm)
    assert training.accelerator.scaler.get_scale() == 1.0
    assert_unchanged(before, training)


def test_a_loss_that_is_not_finite_is_no_matter_of_the_loss_scale(base_model: Path) -> None:
    training = _with_loss_scale(training_of(base_model), 2.0**16)
    batch = batch_of(4)
    batch["noise"][:] = np.nan
    loss, _ = training.step(batch, 1e-3)
    assert math.isnan(loss)
    assert training.accelerator.scaler.get_scale() == 2.0**16
