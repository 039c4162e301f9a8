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

from flax_trainer.base_models import load_base_models
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints
from flax_trainer.models.params import from_torch_layout
from flax_trainer.training import loss_scaling
from flax_trainer.training.loss_scaling import INITIAL_SCALE, unscaled_gradients
from flax_trainer.training.optimizer import AdamWSettings
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import Objective, TrainStep, make_train_step
from shared.diffusion.schedule import NoiseSchedule
from tests.flax_trainer.training.stand_in_models import NOTHING_FROZEN, STAND_INS
from tests.torch_trainer.tiny_training import batch_of, configuration, schedule_of, training_of

SETTINGS = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, max_grad_norm=0.1)
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
# Of stand-ins, whose float16 overflows as that of any model does, in a thousandth of the time.

BATCH = batch_of(4)
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def objective_of(schedule: NoiseSchedule, dtype: str = "float16", scaling_factor: float = 1.0) -> Objective:
    return Objective(schedule, np.ones(1000, np.float32), scaling_factor, jnp.dtype(dtype))


@pytest.fixture(scope="module")
def step() -> TrainStep:
    return jax.jit(make_train_step(STAND_INS, objective_of(NoiseSchedule.from_config(SCHEDULER)), SETTINGS))


def start(scale: float, growth_tracker: int = 0) -> TrainState:
    state = TrainState.create({"weight": np.array(0.7, np.float32)}, scales_loss=True)
    return state._replace(loss_scaler=scaler_at(scale, growth_tracker))


def take(step: TrainStep, state: TrainState, batch: Any = BATCH) -> tuple[TrainState, dict[str, float]]:
    state, metrics = step(state, NOTHING_FROZEN, batch, np.float32(1e-3))
    return state, {name: float(value) for name, value in metrics.items()}


def test_a_batch_that_overflows_is_taken_again_and_no_step_is_lost(step: TrainStep) -> None:
    expected, expected_metrics = take(step, start(2.0**10, growth_tracker=7))
    assert expected_metrics["loss_scale"] == 2.0**10
    assert int(expected.loss_scaler["growth_tracker"]) == 8

    given, metrics = take(step, start(2.0**60, growth_tracker=7))
    assert 2.0**10 < metrics["loss_scale"] < 2.0**40
    assert np.log2(metrics["loss_scale"]) % 1 == 0
    assert metrics["loss_scale"] == float(given.loss_scaler["scale"])
    assert (int(given.step), bool(given.non_finite), int(given.loss_scaler["growth_tracker"])) == (1, False, 1)
    assert metrics["loss"] == expected_metrics["loss"]
    assert metrics["grad_norm"] == pytest.approx(expected_metrics["grad_norm"], rel=1e-2)
    np.testing.assert_allclose(given.params["weight"], expected.params["weight"], rtol=1e-5)
    # Twice that scale overflows, or it would not have been halved once more.
    again, metrics_again = take(step, start(metrics["loss_scale"] * 2))
    assert metrics_again["loss_scale"] == metrics["loss_scale"]
    assert int(again.loss_scaler["growth_tracker"]) == 1


def test_the_scale_grows_after_enough_finite_steps(step: TrainStep) -> None:
    state, metrics = take(step, start(2.0**8, growth_tracker=1999))
    assert metrics["loss_scale"] == float(state.loss_scaler["scale"]) == 2.0**9
    assert int(state.loss_scaler["growth_tracker"]) == 0


def assert_frozen(state: TrainState, before: TrainState) -> None:
    assert bool(state.non_finite)
    for now, then in zip(
        jax.tree.leaves(state._replace(non_finite=None)), jax.tree.leaves(before._replace(non_finite=None)), strict=True
    ):
        np.testing.assert_array_equal(now, then)


def test_a_loss_that_is_not_finite_freezes_the_state(step: TrainStep) -> None:
    before = start(2.0**16)
    state, metrics = take(step, before, BATCH | {"noise": np.full((1, 4, 8, 8, 4), np.nan, np.float32)})
    assert np.isnan(metrics["loss"])
    assert_frozen(state, before)
    after, _ = take(step, state)
    assert_frozen(after, before)


def test_an_overflow_at_scale_one_freezes_the_state() -> None:
    """Of a loss that float32 holds: at SNR 0 the input has nothing of a sample that float16 could not hold."""
    schedule = NoiseSchedule.from_config(SCHEDULER | {"prediction_type": "sample", "rescale_betas_zero_snr": True})
    step = make_train_step(STAND_INS, objective_of(schedule, scaling_factor=1e9), SETTINGS)
    before = start(2.0**3)
    state, metrics = take(step, before, BATCH | {"timesteps": np.full((1, 4), 999, np.int32)})
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert_frozen(state, before)


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, step: TrainStep) -> None:
    state = start(2.0**12, growth_tracker=5)
    for seed in range(2):
        state, _ = take(step, state, batch_of(4, seed))
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(jax.tree.map(np.asarray, state), {})
    checkpoints.wait()
    resumed = checkpoints.restore(2, start(INITIAL_SCALE))
    checkpoints.close()
    assert (float(resumed.loss_scaler["scale"]), int(resumed.loss_scaler["growth_tracker"])) == (2.0**12, 7)
    for seed in range(2, 4):
        state, metrics = take(step, state, batch_of(4, seed))
        resumed, again = take(step, resumed, batch_of(4, seed))
        assert metrics == again
    for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_checkpoint_of_another_precision_begins_with_the_first_scale(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(start(2.0**5)._replace(loss_scaler={}), {})
    checkpoints.wait()
    assert float(checkpoints.restore(0, start(INITIAL_SCALE)).loss_scaler["scale"]) == INITIAL_SCALE
    checkpoints.close()


@pytest.mark.parametrize("slices", [2, 4])
def test_accumulated_slices_are_scaled_as_their_share_of_the_mean(step: TrainStep, slices: int) -> None:
    """As in PyTorch: so the scale at which an element's gradient overflows does not depend on the slices."""
    # Without a condition the weight's gradient is 0 times those of the prediction, so these alone overflow.
    black = {"conditioning_pixel_values": np.zeros((4, 64, 64, 3), np.uint8)}
    whole, sliced = (
        take(step, start(2.0**60), rows | {name: value.reshape(count, -1, 64, 64, 3) for name, value in black.items()})
        for count, rows in ((1, batch_of(4)), (slices, batch_of(4, slices=slices)))
    )
    assert sliced[1]["loss"] == pytest.approx(whole[1]["loss"], rel=1e-5)
    assert sliced[1]["loss_scale"] == whole[1]["loss_scale"] > 2.0**16


def test_all_devices_take_a_step_again_together() -> None:
    """Each with rows of its own, of which those of one overflow first."""
    step = make_train_step(STAND_INS, objective_of(NoiseSchedule.from_config(SCHEDULER)), SETTINGS, axis_name="devices")
    noise = np.random.default_rng(0).standard_normal((8, 1, 2, 8, 8, 4)).astype(np.float32)
    noise[3] *= 100
    rows = {name: np.stack([value] * 8) for name, value in batch_of(2).items()} | {"noise": noise}
    state, metrics = jax.pmap(step, axis_name="devices", in_axes=(None, None, 0, None))(
        start(2.0**40), NOTHING_FROZEN, rows, np.float32(1e-3)
    )
    assert len(set(np.asarray(metrics["loss_scale"]).tolist())) == 1
    assert np.asarray(metrics["loss_scale"])[0] < 2.0**40
    assert len(set(np.asarray(state.params["weight"]).tolist())) == 1
    assert not np.asarray(state.non_finite).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_precisions_have_no_loop_and_no_scale(dtype: str) -> None:
    state = start(1)._replace(loss_scaler={})
    assert "loss_scaler" not in state.to_checkpoint()
    step = make_train_step(STAND_INS, objective_of(NoiseSchedule.from_config(SCHEDULER), dtype), SETTINGS)
    jaxpr = jax.make_jaxpr(step)(state, NOTHING_FROZEN, BATCH, np.float32(1e-3))
    assert "while" not in {equation.primitive.name for equation in jaxpr.eqns}
    assert take(step, state)[1].keys() == {"loss", "grad_norm"}


# --- real models -----------------------------------------------------------------------------------------------------


def test_loss_and_gradients_are_near_those_of_float32(base_model: Path) -> None:
    """Which PyTorch computes here. What is trained is in float32, what is frozen in float16."""
    exact = training_of(base_model)
    batch = batch_of(1)
    models, initial = load_base_models(configuration(base_model, mixed_precision="fp16"), schedule_of(base_model))
    assert {value.dtype.name for value in jax.tree.leaves(initial.frozen)} == {"float16"}
    layouts = models.defs.controlnet.layouts
    params = {
        name: np.ascontiguousarray(from_torch_layout(value.numpy(), layouts[name]))
        for name, value in exact.state.params().items()
    }
    objective = objective_of(models.schedule, scaling_factor=models.configs.vae.scaling_factor)
    step = jax.jit(make_train_step(models.defs, objective, SETTINGS))
    state, metrics = step(TrainState.create(params, scales_loss=True), initial.frozen, batch, np.float32(1e-3))
    assert {value.dtype.name for value in state.params.values()} == {"float32"}
    loss, grad_norm = exact.step(batch, 1e-3)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=2e-3)
    assert float(metrics["loss"]) != pytest.approx(loss, rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(grad_norm, rel=1e-2)
