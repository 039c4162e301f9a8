"""float16 in the Flax backend: its loss scale moves as PyTorch's GradScaler's, and no batch is lost to an overflow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_trainer import loss_scaling
from flax_trainer.base_models import BaseModels, InitialParams, load_base_models
from flax_trainer.checkpoints import Checkpoints
from flax_trainer.loss_scaling import INITIAL_SCALE, unscaled_gradients
from flax_trainer.optimizer import AdamWSettings
from flax_trainer.state import TrainState
from flax_trainer.step import Objective, TrainStep, make_train_step
from tests.flax_trainer.models.unet_reference import FAST_COMPILE
from tests.torch_trainer.tiny_training import batch_of, configuration, relative_difference, schedule_of

SETTINGS = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, max_grad_norm=0.1)
RATE = np.float32(1e-3)
FLOAT16_MAX = float(np.finfo(np.float16).max)


def scaler_at(scale: float, growth_tracker: int = 0) -> dict[str, np.ndarray]:
    return {"scale": np.array(scale, np.float32), "growth_tracker": np.array(growth_tracker, np.int32)}


def overflowing(gradient: float) -> Callable[[Any], tuple[jax.Array, dict[str, jax.Array]]]:
    """The loss and gradients of a network in which this gradient, times the scale, goes through float16."""

    def loss_and_grads(scale: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        scaled = jnp.asarray(gradient, jnp.float32) * scale
        return jnp.float32(1), {"w": jnp.where(jnp.abs(scaled) > FLOAT16_MAX, jnp.inf, scaled) / scale}

    return loss_and_grads


# --- the scale -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(-20, 15), min_size=1, max_size=8))
def test_the_scale_moves_as_that_of_gradscaler(exponents: list[int]) -> None:
    """Which doubles it every `growth_interval` finite steps, and is told to try again where it skipped a step."""
    interval = 3
    reference = torch.amp.GradScaler("cpu", growth_interval=interval)
    param = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([param], lr=0.0)
    scaler = loss_scaling.initial_loss_scaler()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scaling, "GROWTH_INTERVAL", interval)
        for exponent in exponents:
            gradient = 2.0**exponent
            finite = False
            while not finite:
                scaled = reference.scale(torch.tensor(gradient)).item()
                finite = scaled <= FLOAT16_MAX
                param.grad = torch.tensor(scaled if finite else torch.inf)
                reference.step(optimizer)
                reference.update()
            _, grads, scaler = unscaled_gradients(overflowing(gradient), scaler, np.array(False))
            assert float(grads["w"]) == gradient
            state = reference.state_dict()
            assert float(scaler["scale"]) == state["scale"]
            assert int(scaler["growth_tracker"]) == state["_growth_tracker"]


def test_the_defaults_are_gradscalers() -> None:
    reference = torch.amp.GradScaler("cpu").state_dict()
    assert (reference["scale"], reference["growth_interval"]) == (INITIAL_SCALE, loss_scaling.GROWTH_INTERVAL)
    assert (reference["growth_factor"], reference["backoff_factor"]) == (2.0, 0.5)


def test_the_scale_does_not_fall_below_one() -> None:
    loss, grads, scaler = unscaled_gradients(overflowing(1e6), scaler_at(8), np.array(False))
    assert float(loss) == 1
    assert not np.isfinite(grads["w"])
    assert float(scaler["scale"]) == 1


def test_a_scale_that_would_become_infinite_stays() -> None:
    _, _, scaler = unscaled_gradients(overflowing(0.0), scaler_at(2.0**127, 1999), np.array(False))
    assert (float(scaler["scale"]), int(scaler["growth_tracker"])) == (2.0**127, 0)


def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale() -> None:
    def poisoned(scale: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.float32(jnp.nan), {"w": scale * jnp.nan}

    _, _, scaler = unscaled_gradients(poisoned, scaler_at(2.0**16), np.array(False))
    assert float(scaler["scale"]) == 2.0**16


def test_all_devices_take_a_batch_again_when_one_overflows() -> None:
    """The one with the largest gradient decides; all come to the same scale and mean."""
    gradients = np.full(8, 2.0**-10, np.float32)
    gradients[5] = 2.0**3

    def mean_step(gradient: jax.Array) -> Any:
        return unscaled_gradients(
            lambda scale: jax.lax.pmean(overflowing(gradient)(scale), "devices"), scaler_at(2.0**16), np.array(False)
        )

    _, grads, scaler = jax.pmap(mean_step, axis_name="devices")(gradients)
    np.testing.assert_array_equal(scaler["scale"], np.full(8, 2.0**12))
    np.testing.assert_array_equal(grads["w"], np.full(8, gradients.mean()))


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(base_model: Path) -> tuple[BaseModels, InitialParams]:
    return load_base_models(configuration(base_model, mixed_precision="fp16"), schedule_of(base_model))


def objective_of(models: BaseModels, dtype: str) -> Objective:
    return Objective(models.schedule, np.ones(1000, np.float32), models.vae_config.scaling_factor, jnp.dtype(dtype))


@pytest.fixture(scope="module")
def step(loaded: tuple[BaseModels, InitialParams]) -> TrainStep:
    models, _ = loaded
    return jax.jit(
        make_train_step(models.defs, objective_of(models, "float16"), SETTINGS), compiler_options=FAST_COMPILE
    )


@pytest.fixture(scope="module")
def start(loaded: tuple[BaseModels, InitialParams]) -> TrainState:
    """Every weight moved a little: as they start, the zero convolutions keep all other gradients at zero."""
    rng = np.random.default_rng(0)
    awake = {
        name: value + 0.02 * rng.standard_normal(value.shape, np.float32)
        for name, value in loaded[1].controlnet.items()
    }
    return TrainState.create(awake, scales_loss=True)


def test_losses_and_steps_are_near_those_of_float32(
    base_model: Path, loaded: tuple[BaseModels, InitialParams], step: TrainStep, start: TrainState
) -> None:
    _, initial = loaded
    assert {value.dtype.name for params in initial.frozen for value in params.values()} == {"float16"}
    models32, initial32 = load_base_models(configuration(base_model), schedule_of(base_model))
    step32 = jax.jit(
        make_train_step(models32.defs, objective_of(models32, "float32"), SETTINGS), compiler_options=FAST_COMPILE
    )
    half, whole = start, start._replace(loss_scaler={})
    for seed in range(3):
        batch = batch_of(4, seed)
        half, given = step(half, initial.frozen, batch, RATE)
        whole, expected = step32(whole, initial32.frozen, batch, RATE)
        assert float(given["loss"]) == pytest.approx(float(expected["loss"]), rel=2e-3)
        assert float(given["loss"]) != float(expected["loss"])
        assert float(given["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=2e-2)
        assert given.keys() - expected.keys() == {"loss_scale"}
    assert {value.dtype.name for value in half.params.values()} == {"float32"}
    moved = {name: np.asarray(value) - start.params[name] for name, value in whole.params.items()}
    apart = {name: np.asarray(value) - np.asarray(whole.params[name]) for name, value in half.params.items()}
    assert _norm(apart) < 0.1 * _norm(moved)


def _norm(tree: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(value).sum() for value in tree.values())))


def test_a_batch_that_overflows_is_taken_again_and_no_step_is_lost(
    loaded: tuple[BaseModels, InitialParams], step: TrainStep, start: TrainState
) -> None:
    _, initial = loaded
    batch = batch_of(4)
    fits = start._replace(loss_scaler=scaler_at(2.0**10, growth_tracker=7))
    expected, expected_metrics = step(fits, initial.frozen, batch, RATE)
    assert float(expected_metrics["loss_scale"]) == 2.0**10
    assert int(expected.loss_scaler["growth_tracker"]) == 8

    too_high = start._replace(loss_scaler=scaler_at(2.0**40, growth_tracker=7))
    given, metrics = step(too_high, initial.frozen, batch, RATE)
    fallen = float(metrics["loss_scale"])
    assert 1 < fallen < 2.0**40
    assert fallen == float(given.loss_scaler["scale"])
    assert np.log2(fallen) % 1 == 0
    assert (int(given.step), bool(given.halted), int(given.loss_scaler["growth_tracker"])) == (1, False, 1)
    assert float(metrics["loss"]) == float(expected_metrics["loss"])
    assert float(metrics["grad_norm"]) == pytest.approx(float(expected_metrics["grad_norm"]), rel=1e-2)
    for name, value in expected.params.items():
        assert relative_difference(given.params[name], value) < 1e-2, name


def test_the_scale_grows_after_enough_finite_steps(
    loaded: tuple[BaseModels, InitialParams], step: TrainStep, start: TrainState
) -> None:
    nearly = start._replace(loss_scaler=scaler_at(2.0**8, growth_tracker=1999))
    state, metrics = step(nearly, loaded[1].frozen, batch_of(4), RATE)
    assert float(metrics["loss_scale"]) == float(state.loss_scaler["scale"]) == 2.0**9
    assert int(state.loss_scaler["growth_tracker"]) == 0


def test_what_no_scale_can_mend_freezes_the_state(
    loaded: tuple[BaseModels, InitialParams], step: TrainStep, start: TrainState
) -> None:
    """A loss that is not finite; and a prediction that float16 holds, whose gradient it cannot, even at scale 1."""
    _, initial = loaded
    poisoned = batch_of(4) | {"noise": np.full((1, 4, 8, 8, 4), np.nan, np.float32)}
    huge_targets = batch_of(4) | {"noise": np.full((1, 4, 8, 8, 4), 1e12, np.float32)}
    for batch in (poisoned, huge_targets):
        state, metrics = step(start, initial.frozen, batch, RATE)
        assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
        assert bool(state.halted)
        assert int(state.step) == 0
        for after, kept in zip(
            jax.tree.leaves((state.params, state.mu, state.loss_scaler)),
            jax.tree.leaves((start.params, start.mu, start.loss_scaler)),
            strict=True,
        ):
            np.testing.assert_array_equal(after, kept)


def test_a_resumed_run_goes_on_bit_for_bit(
    tmp_path: Path, loaded: tuple[BaseModels, InitialParams], step: TrainStep, start: TrainState
) -> None:
    _, initial = loaded
    state = start._replace(loss_scaler=scaler_at(2.0**30))
    for seed in range(2):
        state, _ = step(state, initial.frozen, batch_of(4, seed), RATE)
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(jax.tree.map(np.asarray, state), {})
    checkpoints.wait()
    resumed = checkpoints.restore(2, start)
    checkpoints.close()
    assert 2.0**30 > float(resumed.loss_scaler["scale"]) != INITIAL_SCALE
    for seed in range(2, 4):
        state, metrics = step(state, initial.frozen, batch_of(4, seed), RATE)
        resumed, again = step(resumed, initial.frozen, batch_of(4, seed), RATE)
        assert jax.tree.map(float, metrics) == jax.tree.map(float, again)
    for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_accumulated_slices_are_scaled_as_their_share_of_the_mean(
    loaded: tuple[BaseModels, InitialParams], step: TrainStep, start: TrainState
) -> None:
    """As in PyTorch: so neither the gradients nor the scale at which they overflow depend on the slices."""
    _, initial = loaded
    too_high = start._replace(loss_scaler=scaler_at(2.0**40))
    _, whole = step(too_high, initial.frozen, batch_of(4), RATE)
    _, sliced = step(too_high, initial.frozen, batch_of(4, slices=2), RATE)
    assert float(sliced["loss"]) == pytest.approx(float(whole["loss"]), rel=2e-3)
    assert float(sliced["grad_norm"]) == pytest.approx(float(whole["grad_norm"]), rel=2e-2)
    assert abs(np.log2(float(sliced["loss_scale"]) / float(whole["loss_scale"]))) <= 1


def test_other_precisions_have_no_loop_and_no_scale(base_model: Path) -> None:
    models, initial = load_base_models(configuration(base_model), schedule_of(base_model))
    state = TrainState.create(initial.controlnet)
    assert state.loss_scaler == {}
    assert "loss_scaler" not in state.to_checkpoint()
    for dtype in ("float32", "bfloat16"):
        train_step = make_train_step(models.defs, objective_of(models, dtype), SETTINGS)
        jaxpr = jax.make_jaxpr(train_step)(state, initial.frozen, batch_of(2), RATE)
        assert "while" not in {equation.primitive.name for equation in jaxpr.eqns}
