"""Samplers as tables of numbers.

S inference steps; B batch. Samples are in any layout (BHWC in JAX, BCHW in PyTorch).

All samplers are linear: every step forms the clean sample x0 that the network's output implies, corrects the sample
with it, and moves on, each time by a fixed linear combination of what it already holds. The coefficients depend on the
schedule alone, so they are computed here, once, in float64, and a step is the same few multiplications whichever
backend runs it: a body of `jax.lax.scan` over `plan.coefficients`, or of a Python loop over `plan.steps()`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shared.diffusion.sampler_timesteps import (
    ddim_timesteps,
    euler_timesteps,
    refuse_undefined,
    sigmas_at,
    signal_and_noise,
    unipc_timesteps,
)
from shared.diffusion.schedule import Array, NoiseSchedule, PredictionType, predicted_noise, predicted_x0
from shared.randomness import Purpose, generator
from shared.untrusted import shown
from shared.user_errors import UserError


class StepCoefficients(NamedTuple):
    """One step's numbers (for all steps: the same with a leading S axis). float32, and int32 where they are whole."""

    timestep: Array  # [] what the network is told
    x0: Array  # [2] x0 from (sample, model output)
    corrector: Array  # [5] corrected sample from (sample, last corrected sample, x0, x0 before, x0 before that)
    predictor: Array  # [4] next sample from (corrected sample, model output, x0, x0 before)


class SamplerState(NamedTuple):
    """What a step hands to the next; four arrays of one shape."""

    sample: Array
    last_corrected: Array
    x0_before: Array
    x0_before_that: Array


@dataclass(frozen=True, eq=False)
class SamplerPlan:
    """All steps of one sampler on one schedule, in the coordinates of what the network is given."""

    coefficients: StepCoefficients
    clip_range: float | None = None  # the predicted x0 is clipped to [-clip_range, clip_range]
    initial_scale: float = 1.0  # the first sample is unit Gaussian noise times this

    @property
    def num_inference_steps(self) -> int:
        """S."""
        return len(self.coefficients.timestep)

    def steps(self) -> Iterator[StepCoefficients]:
        """The steps in order, as Python numbers (for PyTorch and numpy; `lax.scan` takes `coefficients` whole)."""
        for step in zip(*(table.tolist() for table in self.coefficients), strict=True):
            yield StepCoefficients(*step)


def initial_state(plan: SamplerPlan, noise: Array) -> SamplerState:
    """The state before the first step. `noise`: float32 unit Gaussian noise."""
    sample = noise * plan.initial_scale
    nothing = sample * 0
    return SamplerState(sample, nothing, nothing, nothing)


def sampler_step(plan: SamplerPlan, step: StepCoefficients, state: SamplerState, model_output: Array) -> SamplerState:
    """One step. `model_output` is the network's (guided) output at `state.sample` and `step.timestep`, in float32."""
    x0 = state.sample * step.x0[0] + model_output * step.x0[1]
    if plan.clip_range is not None:
        x0 = x0.clip(-plan.clip_range, plan.clip_range)
    corrected = (
        state.sample * step.corrector[0]
        + state.last_corrected * step.corrector[1]
        + x0 * step.corrector[2]
        + state.x0_before * step.corrector[3]
        + state.x0_before_that * step.corrector[4]
    )
    following = (
        corrected * step.predictor[0]
        + model_output * step.predictor[1]
        + x0 * step.predictor[2]
        + state.x0_before * step.predictor[3]
    )
    return SamplerState(following, corrected, x0, state.x0_before)


def guided(unconditional: Array, conditional: Array, guidance_scale: float) -> Array:
    """Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6, in Imagen's parametrisation."""
    return unconditional + guidance_scale * (conditional - unconditional)


def initial_latents(seed: int, indices: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """float32 unit Gaussian noise [len(indices), *shape]: each entry depends on the seed and its own index alone.

    Validation numbers its images; both backends start image `index` from the same latents at every step of training.
    `shape` is (H, W, C) of the latents.
    """
    draws = [generator(seed, Purpose.VALIDATION, index).standard_normal(shape, dtype=np.float32) for index in indices]
    return np.stack(draws)


def sampler_plan(name: str, schedule: NoiseSchedule, num_inference_steps: int) -> SamplerPlan:
    """The plan of the sampler called `name`, one of `SAMPLERS`.

    Raises:
        UserError: unknown name, or as the sampler's own function raises.
    """
    if name not in SAMPLERS:
        raise UserError(f"The sampler is {name!r}; expected one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name](schedule, num_inference_steps)


def validation_plan(schedule: NoiseSchedule) -> SamplerPlan:
    """How validation images are sampled: 20 steps of UniPC, as diffusers' `train_controlnet.py` does it."""
    return unipc_plan(schedule, 20)


def ddim_plan(schedule: NoiseSchedule, num_inference_steps: int) -> SamplerPlan:
    """Deterministic DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12, without its noise).

    Options and their defaults are those of diffusers' DDIMScheduler: timestep_spacing "leading", steps_offset 0,
    set_alpha_to_one, clip_sample and clip_sample_range.

    Raises:
        UserError: an option or a number of steps that has no such plan.
    """
    config = schedule.config
    _refuse_unless_neutral("DDIM", config, {"thresholding": (False,)})
    timesteps = ddim_timesteps(schedule, num_inference_steps)
    alphas_bar = schedule.alphas_cumprod.astype(np.float64)
    final_alpha_bar = 1.0 if config.get("set_alpha_to_one", True) else alphas_bar[0]
    before = timesteps - schedule.num_train_timesteps // num_inference_steps
    alphas_bar_before = np.where(before >= 0, alphas_bar[np.maximum(before, 0)], final_alpha_bar)

    a_S, s_S = np.sqrt(alphas_bar[timesteps]), np.sqrt(1 - alphas_bar[timesteps])
    a_before_S, s_before_S = np.sqrt(alphas_bar_before), np.sqrt(1 - alphas_bar_before)
    noise = _linear_in_sample_and_output(predicted_noise, schedule.prediction_type, a_S, s_S) * s_before_S[:, None]
    predictor = np.stack([noise[:, 0], noise[:, 1], a_before_S, np.zeros_like(a_S)], axis=1)
    return SamplerPlan(
        _checked_coefficients(
            timesteps,
            _linear_in_sample_and_output(predicted_x0, schedule.prediction_type, a_S, s_S),
            corrector=_without_corrector(len(timesteps)),
            predictor=predictor,
        ),
        clip_range=float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", True) else None,
    )


def unipc_plan(schedule: NoiseSchedule, num_inference_steps: int) -> SamplerPlan:
    """UniPC-2 in its B₂(h) form, predicting x0 (Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework…").

    Options and their defaults are those of diffusers' UniPCMultistepScheduler: timestep_spacing "linspace",
    steps_offset 0 and final_sigmas_type "zero"; of its solver's options only the defaults are supported.

    Raises:
        UserError: an option or a number of steps that has no such plan.
    """
    _refuse_unless_neutral("UniPC", schedule.config, _UNIPC_SUPPORTED)
    timesteps = unipc_timesteps(schedule, num_inference_steps)
    sigmas = sigmas_at(schedule, timesteps)
    a_S, s_S = signal_and_noise(sigmas[:-1])
    steps = len(timesteps)
    # Order 1 where history or future is short: the first step, and the last (diffusers' lower_order_final).
    orders = [min(2, step + 1, steps - step) for step in range(steps)]
    return SamplerPlan(
        _checked_coefficients(
            timesteps,
            _linear_in_sample_and_output(predicted_x0, schedule.prediction_type, a_S, s_S),
            corrector=np.stack(
                [_UNCORRECTED] + [_unipc_corrector(sigmas, step, orders[step - 1]) for step in range(1, steps)]
            ),
            predictor=np.stack([_unipc_predictor(sigmas, step, orders[step]) for step in range(steps)]),
        ),
    )


def euler_plan(schedule: NoiseSchedule, num_inference_steps: int) -> SamplerPlan:
    """Euler's method in sigma (Karras et al. 2022, "Elucidating the Design Space…", Algorithm 1 without its noise).

    diffusers keeps a + s·noise over a, whose noise has the size sigma = s/a; the plan keeps what the network is given,
    that times a. There x0 + (next sigma)·noise is a step of DDIM between these sigmas.

    Options and their defaults are those of diffusers' EulerDiscreteScheduler: timestep_spacing "linspace",
    steps_offset 0 and final_sigmas_type "zero"; sigmas are those of the schedule.

    Raises:
        UserError: an option or a number of steps that has no such plan.
    """
    config = schedule.config
    _refuse_unless_neutral("Euler's method", config, _EULER_SUPPORTED)
    timesteps = euler_timesteps(schedule, num_inference_steps)
    sigmas = sigmas_at(schedule, timesteps)
    a_S, s_S = signal_and_noise(sigmas[:-1])
    # What diffusers ends with it decodes as it is, without a factor a that final_sigmas_type sigma_min would bring.
    a_after_S, s_after_S = np.append(a_S[1:], 1.0), np.append(s_S[1:], sigmas[-1])

    noise = _linear_in_sample_and_output(predicted_noise, schedule.prediction_type, a_S, s_S) * s_after_S[:, None]
    return SamplerPlan(
        _checked_coefficients(
            timesteps,
            _linear_in_sample_and_output(predicted_x0, schedule.prediction_type, a_S, s_S),
            corrector=_without_corrector(len(timesteps)),
            predictor=np.stack([noise[:, 0], noise[:, 1], a_after_S, np.zeros_like(a_S)], axis=1),
        ),
        # diffusers starts from unit noise times sqrt(sigma² + 1) with leading, times sigma otherwise.
        initial_scale=1.0 if config.get("timestep_spacing", "linspace") == "leading" else float(s_S[0]),
    )


def dpm_solver_plan(schedule: NoiseSchedule, num_inference_steps: int) -> SamplerPlan:
    """DPM-Solver++(2M) by midpoints (Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling…", Algorithm 2).

    Its step is that of UniPC's predictor. Options and their defaults are those of diffusers'
    DPMSolverMultistepScheduler: timestep_spacing "linspace", steps_offset 0, final_sigmas_type "zero",
    lower_order_final and euler_at_final; of its solver's options only the defaults are supported.

    Raises:
        UserError: an option or a number of steps that has no such plan.
    """
    config = schedule.config
    _refuse_unless_neutral("DPM-Solver++", config, _DPM_SOLVER_SUPPORTED)
    timesteps = unipc_timesteps(schedule, num_inference_steps)
    sigmas = sigmas_at(schedule, timesteps)
    a_S, s_S = signal_and_noise(sigmas[:-1])
    steps = len(timesteps)
    lower_at_end = sigmas[-1] == 0 or config.get("euler_at_final", False) or steps < _FEW_STEPS
    orders = [1 if step == 0 or (step == steps - 1 and lower_at_end) else 2 for step in range(steps)]
    return SamplerPlan(
        _checked_coefficients(
            timesteps,
            _linear_in_sample_and_output(predicted_x0, schedule.prediction_type, a_S, s_S),
            corrector=_without_corrector(steps),
            predictor=np.stack([_unipc_predictor(sigmas, step, orders[step]) for step in range(steps)]),
        ),
    )


SAMPLERS: dict[str, Callable[[NoiseSchedule, int], SamplerPlan]] = {
    "ddim": ddim_plan,
    "unipc": unipc_plan,
    "euler": euler_plan,
    "dpmsolver++": dpm_solver_plan,
}

_UNCORRECTED = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
_FEW_STEPS = 15  # with fewer, diffusers' DPMSolverMultistepScheduler ends with order 1 (its lower_order_final)

# What each option may be. The other solver types belong to DPM-Solver++'s configurations; UniPC reads them as bh2.
_UNIPC_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "solver_order": (2,),
    "solver_type": ("bh2", "midpoint", "heun", "logrho"),
    "predict_x0": (True,),
    "lower_order_final": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_flow_sigmas": (False,),
}
_EULER_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
}
_DPM_SOLVER_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "solver_order": (2,),
    "algorithm_type": ("dpmsolver++", "deis"),  # diffusers reads deis as dpmsolver++
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # and other solvers' types as midpoint
    "lower_order_final": (True,),
    "euler_at_final": (False, True),
    "lambda_min_clipped": (-math.inf,),
    "variance_type": (None,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
}


def _linear_in_sample_and_output(
    formula: Callable[..., Array], prediction_type: PredictionType, a_S: np.ndarray, s_S: np.ndarray
) -> np.ndarray:
    """[S, 2]: the coefficients of a conversion from (sample, model output), read off at (1, 0) and (0, 1)."""
    one, zero = np.ones_like(a_S), np.zeros_like(a_S)
    with np.errstate(divide="ignore", invalid="ignore"):  # _checked_coefficients reports it in words
        from_sample = formula(prediction_type, zero, one, a_S, s_S)
        from_output = formula(prediction_type, one, zero, a_S, s_S)
    return np.stack([from_sample, from_output], axis=1)


def _without_corrector(steps: int) -> np.ndarray:
    """[S, 5]."""
    return np.tile(_UNCORRECTED, (steps, 1))


def _checked_coefficients(
    timesteps: np.ndarray, x0: np.ndarray, corrector: np.ndarray, predictor: np.ndarray
) -> StepCoefficients:
    coefficients = StepCoefficients(
        timesteps.astype(np.int32 if np.issubdtype(timesteps.dtype, np.integer) else np.float32),
        x0.astype(np.float32),
        corrector.astype(np.float32),
        predictor.astype(np.float32),
    )
    finite = np.isfinite(np.concatenate([x0, corrector, predictor], axis=1)).all(axis=1)
    refuse_undefined(timesteps, ~finite)
    return coefficients


def _refuse_unless_neutral(sampler: str, config: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    for option, values in supported.items():
        if option in config and config[option] not in values:
            raise UserError(
                f"The scheduler's {option} is {shown(repr(config[option]))}, which {sampler} does not support here; "
                f"expected {' or '.join(map(repr, values))}. Change it in scheduler_config.json, or choose another "
                "sampler."
            )


def _unipc_predictor(sigmas: np.ndarray, step: int, order: int) -> np.ndarray:
    """[4] UniP from `step` to `step + 1` (Zhao et al. 2023, Algorithm 2)."""
    a, s = signal_and_noise(sigmas)
    if order == 1:
        growth = np.expm1(-_log_snr_gain(sigmas, step, step + 1))
        return np.array([s[step + 1] / s[step], 0.0, -a[step + 1] * growth, 0.0])
    gain = _log_snr_gain(sigmas, step, step + 1)
    growth = np.expm1(-gain)
    ratio = -_log_snr_gain(sigmas, step - 1, step) / gain
    difference = -a[step + 1] * growth * 0.5 / ratio  # coefficient of (x0 before - x0)
    return np.array([s[step + 1] / s[step], 0.0, -a[step + 1] * growth - difference, difference])


def _unipc_corrector(sigmas: np.ndarray, step: int, order: int) -> np.ndarray:
    """[5] UniC at `step`, redoing the move from `step - 1` now that x0 is known (Zhao et al. 2023, Algorithm 1)."""
    a, s = signal_and_noise(sigmas)
    gain = _log_snr_gain(sigmas, step - 1, step)
    growth = np.expm1(-gain)
    now, before = 0.5, 0.0
    ratio = 1.0
    if order == 2:
        # The paper's Theorem 3.1 for p = 2; predicting x0 instead of noise turns h into -h.
        ratio = -_log_snr_gain(sigmas, step - 2, step - 1) / gain
        phi_2 = growth / -gain - 1
        phi_3 = phi_2 / -gain - 0.5
        before, now = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [phi_2 / growth, 2 * phi_3 / growth])
    scale = -a[step] * growth
    difference = scale * before / ratio
    return np.array([0.0, s[step] / s[step - 1], scale * now, scale * (1 - now) - difference, difference])


def _log_snr_gain(sigmas: np.ndarray, start: int, stop: int) -> float:
    """λ(stop) - λ(start), where λ = log(a/s) = -log(sigma); infinite where sigma reaches 0."""
    if sigmas[stop] == 0:
        return np.inf
    return float(np.log(sigmas[start]) - np.log(sigmas[stop]))
