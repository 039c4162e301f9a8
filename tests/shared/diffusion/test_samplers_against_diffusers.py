"""Every step of every plan against diffusers' schedulers, on the same configuration and the same fake network."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler

from shared.diffusion.samplers import (
    SAMPLERS,
    StepCoefficients,
    ddim_plan,
    initial_latents,
    initial_state,
    sampler_plan,
    sampler_step,
    unipc_plan,
)
from shared.diffusion.schedule import NoiseSchedule

# diffusers turns a tensor into an array in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SD15 = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
DIFFUSERS = {"ddim": DDIMScheduler, "unipc": UniPCMultistepScheduler}
SHAPE = (2, 4, 4, 3)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True, "clip_sample": True},
    {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min", "clip_sample": True, "clip_sample_range": 0.4},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
]


def fake_network(x: Any, timestep: float) -> Any:
    """A smooth function of x and t made of arithmetic alone, so that all backends compute the same."""
    return 0.6 * x - 0.1 * x * x * x / (1 + x * x) + 0.05 * (timestep / 1000 - 0.5)


def diffusers_trajectory(name: str, config: dict[str, Any], count: int, start: np.ndarray) -> list[np.ndarray]:
    scheduler = DIFFUSERS[name].from_config(config)
    scheduler.set_timesteps(count)
    sample, trajectory = torch.from_numpy(start), []
    for timestep in scheduler.timesteps:
        sample = scheduler.step(fake_network(sample, float(timestep)), timestep, sample, return_dict=False)[0]
        trajectory.append(sample.numpy())
    return trajectory


def assert_same_trajectory(name: str, config: dict[str, Any], count: int) -> None:
    plan = SAMPLERS[name](NoiseSchedule.from_config(config), count)
    start = initial_latents(0, [0, 1], SHAPE[1:])
    expected = diffusers_trajectory(name, config, count, start)
    assert len(expected) == plan.num_inference_steps
    state = initial_state(start)
    for step, theirs in zip(plan.steps(), expected, strict=True):
        state = sampler_step(plan, step, state, fake_network(state.sample, step.timestep))
        assert np.abs(state.sample - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())) or "sd15")
def test_every_step_matches(name: str, count: int, prediction_type: str, variant: dict[str, Any]) -> None:
    assert_same_trajectory(name, SD15 | variant | {"prediction_type": prediction_type}, count)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("count", [5, 10, 20, 50])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_every_step_matches_with_zero_terminal_snr(name: str, count: int, prediction_type: str, spacing: str) -> None:
    config = SD15 | {
        "rescale_betas_zero_snr": True,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
    }
    assert_same_trajectory(name, config, count)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_match_for_every_number_of_steps(name: str, spacing: str) -> None:
    config = SD15 | {"timestep_spacing": spacing, "steps_offset": 0}
    schedule = NoiseSchedule.from_config(config)
    scheduler = DIFFUSERS[name].from_config(config)
    for count in [*range(1, 101), 125, 150, 200, 250, 333, 499]:
        scheduler.set_timesteps(count)
        # Where rounding makes diffusers' trailing range one too long, its extra timestep is -1.
        expected = [int(timestep) for timestep in scheduler.timesteps if timestep >= 0]
        assert SAMPLERS[name](schedule, count).coefficients.timestep.tolist() == expected


def test_one_plan_runs_alike_in_numpy_torch_and_a_jax_scan() -> None:
    plan = unipc_plan(NoiseSchedule.from_config(SD15), 20)
    start = initial_latents(3, [7], SHAPE[1:])

    in_numpy, in_torch = initial_state(start), initial_state(torch.from_numpy(start))
    for step in plan.steps():
        in_numpy = sampler_step(plan, step, in_numpy, fake_network(in_numpy.sample, step.timestep))
        in_torch = sampler_step(plan, step, in_torch, fake_network(in_torch.sample, step.timestep))

    @jax.jit
    def run(sample: jax.Array) -> jax.Array:
        def body(state: Any, step: StepCoefficients) -> tuple[Any, None]:
            return sampler_step(plan, step, state, fake_network(state.sample, step.timestep)), None

        return jax.lax.scan(body, initial_state(sample), plan.coefficients)[0].sample

    in_jax = run(jnp.asarray(start))
    assert in_numpy.sample.dtype == np.float32
    assert in_jax.dtype == jnp.float32
    assert in_torch.sample.dtype == torch.float32
    np.testing.assert_allclose(in_jax, in_numpy.sample, rtol=0, atol=2e-6)
    np.testing.assert_allclose(in_torch.sample.numpy(), in_numpy.sample, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_network_recovers_the_clean_sample(name: str, prediction_type: str) -> None:
    """A network that knows x0 leads to x0, whatever it expresses it as."""
    schedule = NoiseSchedule.from_config(SD15 | {"prediction_type": prediction_type, "set_alpha_to_one": True})
    plan = SAMPLERS[name](schedule, 10)
    x0, start = initial_latents(1, [0, 1], SHAPE)
    state = initial_state(start)
    for step in plan.steps():
        a = schedule.sqrt_alphas_cumprod[step.timestep]
        s = schedule.sqrt_one_minus_alphas_cumprod[step.timestep]
        noise = (state.sample - a * x0) / s
        output = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[prediction_type]
        state = sampler_step(plan, step, state, output)
    np.testing.assert_allclose(state.sample, x0, rtol=0, atol=1e-5)


def test_initial_latents_belong_to_their_index() -> None:
    together = initial_latents(5, [0, 1, 2], (8, 8, 4))
    assert together.dtype == np.float32
    assert together.shape == (3, 8, 8, 4)
    np.testing.assert_array_equal(initial_latents(5, [2], (8, 8, 4))[0], together[2])
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(initial_latents(6, [0], (8, 8, 4))[0], together[0])
    many = initial_latents(5, list(range(50)), (32, 32, 4))
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("ddim", {"thresholding": True}, "thresholding"),
        ("unipc", {"thresholding": True}, "thresholding"),
        ("unipc", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("unipc", {"solver_order": 3}, "solver_order"),
        ("unipc", {"final_sigmas_type": "half"}, "final_sigmas_type"),
        ("ddim", {"timestep_spacing": "sideways"}, "timestep_spacing"),
        ("unipc", {"timestep_spacing": "sideways"}, "timestep_spacing"),
        ("ddim", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, "v_prediction"),
        ("ddim", {"num_train_timesteps": 10}, "steps_offset"),
        ("unipc", {"num_train_timesteps": 10}, "fewer steps"),
    ],
)
def test_what_has_no_plan_is_refused(name: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sampler_plan(name, NoiseSchedule.from_config(SD15 | change), 10)


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 1000"):
        ddim_plan(NoiseSchedule.from_config(SD15), count)


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(ValueError, match="ddim, unipc"):
        sampler_plan("euler", NoiseSchedule.from_config(SD15), 10)


def test_dpm_solver_types_are_read_as_diffusers_reads_them() -> None:
    assert_same_trajectory("unipc", SD15 | {"solver_type": "midpoint"}, 10)
