"""Every step of every plan against diffusers' schedulers, on the same configuration and the same fake network."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

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
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
DIFFUSERS = {
    "ddim": DDIMScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
}
SHAPE = (2, 4, 4, 3)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True, "clip_sample": True},
    {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min", "clip_sample": True, "clip_sample_range": 0.4},
    {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min", "euler_at_final": True},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
]


def fake_network(x: Any, timestep: float) -> Any:
    """A smooth function of x and t made of arithmetic alone, so that all backends compute the same."""
    return 0.6 * x - 0.1 * x * x * x / (1 + x * x) + 0.05 * (timestep / 1000 - 0.5)


def diffusers_trajectory(
    name: str, config: dict[str, Any], count: int, start: np.ndarray
) -> list[tuple[np.ndarray, float]]:
    """What the network is given at every step but the first, and the last sample; with each, how well float32 holds it.

    Euler's method there begins at samples as large as sigma, thousands where there is next to no signal.
    """
    scheduler = DIFFUSERS[name].from_config(config)
    scheduler.set_timesteps(count)
    sample = torch.from_numpy(start) * scheduler.init_noise_sigma
    given = scheduler.scale_model_input(sample, scheduler.timesteps[0])
    rounding = 2.0**-22 * float(sample.abs().max())  # of a difference, a quotient, a product and a sum
    trajectory = []
    for number, timestep in enumerate(scheduler.timesteps, start=1):
        sample = scheduler.step(fake_network(given, float(timestep)), timestep, sample, return_dict=False)[0]
        given = sample if number == len(scheduler.timesteps) else scheduler.scale_model_input(sample, timestep)
        trajectory.append((given.numpy(), rounding * float((given / sample).max())))
    return trajectory


def assert_same_trajectory(name: str, config: dict[str, Any], count: int) -> None:
    plan = SAMPLERS[name](NoiseSchedule.from_config(config), count)
    start = initial_latents(0, [0, 1], SHAPE[1:])
    expected = diffusers_trajectory(name, config, count, start)
    assert len(expected) == plan.num_inference_steps
    state = initial_state(plan, start)
    for step, (theirs, rounding) in zip(plan.steps(), expected, strict=True):
        state = sampler_step(plan, step, state, fake_network(state.sample, step.timestep))
        assert np.abs(state.sample - theirs).max() <= 1e-5 * np.abs(theirs).max() + rounding


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())) or "sd15")
def test_every_step_matches(name: str, count: int, prediction_type: str, variant: dict[str, Any]) -> None:
    assert_same_trajectory(name, SD15 | variant | {"prediction_type": prediction_type}, count)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("count", [4, 20])
def test_every_step_matches_on_the_configuration_of_sdxl(name: str, count: int) -> None:
    assert_same_trajectory(name, SDXL, count)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_euler_starts_from_the_noise_of_its_spacing(spacing: str) -> None:
    """The first input is what diffusers makes of unit noise, which is not unit noise for every spacing."""
    config = SDXL | {"timestep_spacing": spacing}
    scheduler = EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(7)
    noise = torch.from_numpy(initial_latents(0, [0], SHAPE[1:]))
    theirs = scheduler.scale_model_input(noise * scheduler.init_noise_sigma, scheduler.timesteps[0])
    plan = SAMPLERS["euler"](NoiseSchedule.from_config(config), 7)
    np.testing.assert_allclose(initial_state(plan, noise).sample, theirs, rtol=1e-6, atol=0)
    assert (plan.initial_scale == 1) == (spacing == "leading")


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
        expected = [float(timestep) for timestep in scheduler.timesteps if timestep >= 0]
        assert SAMPLERS[name](schedule, count).coefficients.timestep.tolist() == expected


def test_one_plan_runs_alike_in_numpy_torch_and_a_jax_scan() -> None:
    plan = unipc_plan(NoiseSchedule.from_config(SD15), 20)
    start = initial_latents(3, [7], SHAPE[1:])

    in_numpy, in_torch = initial_state(plan, start), initial_state(plan, torch.from_numpy(start))
    for step in plan.steps():
        in_numpy = sampler_step(plan, step, in_numpy, fake_network(in_numpy.sample, step.timestep))
        in_torch = sampler_step(plan, step, in_torch, fake_network(in_torch.sample, step.timestep))

    @jax.jit
    def run(sample: jax.Array) -> jax.Array:
        def body(state: Any, step: StepCoefficients) -> tuple[Any, None]:
            return sampler_step(plan, step, state, fake_network(state.sample, step.timestep)), None

        return jax.lax.scan(body, initial_state(plan, sample), plan.coefficients)[0].sample

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
    config = SD15 | {"prediction_type": prediction_type, "set_alpha_to_one": True, "timestep_spacing": "leading"}
    schedule = NoiseSchedule.from_config(config)
    plan = SAMPLERS[name](schedule, 10)
    x0, start = initial_latents(1, [0, 1], SHAPE)
    state = initial_state(plan, start)
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
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type"),
        ("euler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("euler", {"timestep_spacing": "sideways"}, "timestep_spacing"),
        ("dpmsolver++", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("dpmsolver++", {"solver_type": "heun"}, "solver_type"),
        ("dpmsolver++", {"solver_order": 3}, "solver_order"),
        ("dpmsolver++", {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
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
    with pytest.raises(ValueError, match="ddim, unipc, euler"):
        sampler_plan("heun", NoiseSchedule.from_config(SD15), 10)


def test_dpm_solver_types_are_read_as_diffusers_reads_them() -> None:
    assert_same_trajectory("unipc", SD15 | {"solver_type": "midpoint"}, 10)
