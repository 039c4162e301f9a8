"""Samplers as tables of numbers.

S inference steps; B batch. Samples are in any layout (BHWC in JAX, BCHW in PyTorch).

Both samplers are linear: every step forms the clean sample x0 that the network's output implies, corrects the sample
with it, and moves on, each time by a fixed linear combination of what it already holds. The coefficients depend on the
schedule alone, so they are computed here, once, in float64, and a step is the same few multiplications whichever
backend runs it: a body of `jax.lax.scan` over `plan.coefficients`, or of a Python loop over `plan.steps()`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shared.diffusion.schedule import Array, NoiseSchedule, PredictionType, predicted_noise, predicted_x0
from shared.randomness import Purpose, generator
from shared.untrusted import shown
from shared.user_errors import UserError


class StepCoefficients(NamedTuple):
    """One step's numbers (for all steps: the same with a leading S axis). int32 and float32."""

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
    """All steps of one sampler on one schedule. Start from unit Gaussian noise."""

    coefficients: StepCoefficients
    clip_range: float | None  # the predicted x0 is clipped to [-clip_range, clip_range]

    @property
    def num_inference_steps(self) -> int:
        """S."""
        return len(self.coefficients.timestep)

    def steps(self) -> Iterator[StepCoefficients]:
        """The steps in order, as Python numbers (for PyTorch and numpy; `lax.scan` takes `coefficients` whole)."""
        for step in zip(*(table.tolist() for table in self.coefficients), strict=True):
            yield StepCoefficients(*step)


def initial_state(sample: Array) -> SamplerState:
    """The state before the first step. `sample`: float32 unit Gaussian noise."""
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
    """The plan of the sampler called `name`: "ddim" or "unipc".

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
    timesteps = _ddim_timesteps(schedule, num_inference_steps)
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
            corrector=np.tile([1.0, 0.0, 0.0, 0.0, 0.0], (len(timesteps), 1)),
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
    timesteps = _unipc_timesteps(schedule, num_inference_steps)
    sigmas = _unipc_sigmas(schedule, timesteps)
    a_S, s_S = _signal_and_noise(sigmas[:-1])
    steps = len(timesteps)
    # Order 1 where history or future is short: the first step, and the last (diffusers' lower_order_final).
    orders = [min(2, step + 1, steps - step) for step in range(steps)]
    uncorrected = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
    return SamplerPlan(
        _checked_coefficients(
            timesteps,
            _linear_in_sample_and_output(predicted_x0, schedule.prediction_type, a_S, s_S),
            corrector=np.stack(
                [uncorrected] + [_unipc_corrector(sigmas, step, orders[step - 1]) for step in range(1, steps)]
            ),
            predictor=np.stack([_unipc_predictor(sigmas, step, orders[step]) for step in range(steps)]),
        ),
        clip_range=None,
    )


SAMPLERS: dict[str, Callable[[NoiseSchedule, int], SamplerPlan]] = {"ddim": ddim_plan, "unipc": unipc_plan}

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


def _linear_in_sample_and_output(
    formula: Callable[..., Array], prediction_type: PredictionType, a_S: np.ndarray, s_S: np.ndarray
) -> np.ndarray:
    """[S, 2]: the coefficients of a conversion from (sample, model output), read off at (1, 0) and (0, 1)."""
    one, zero = np.ones_like(a_S), np.zeros_like(a_S)
    with np.errstate(divide="ignore", invalid="ignore"):  # _checked_coefficients reports it in words
        from_sample = formula(prediction_type, zero, one, a_S, s_S)
        from_output = formula(prediction_type, one, zero, a_S, s_S)
    return np.stack([from_sample, from_output], axis=1)


def _checked_coefficients(
    timesteps: np.ndarray, x0: np.ndarray, corrector: np.ndarray, predictor: np.ndarray
) -> StepCoefficients:
    coefficients = StepCoefficients(
        timesteps.astype(np.int32),
        x0.astype(np.float32),
        corrector.astype(np.float32),
        predictor.astype(np.float32),
    )
    finite = np.isfinite(np.concatenate([x0, corrector, predictor], axis=1)).all(axis=1)
    _refuse_undefined(timesteps, ~finite)
    return coefficients


def _refuse_undefined(timesteps: np.ndarray, undefined: np.ndarray) -> None:
    if undefined.any():
        raise UserError(
            f"Sampling is undefined at timestep {timesteps[undefined][0]}: the network's output cannot be turned into "
            "a clean sample there, because the schedule has no signal or no noise left at that timestep "
            "(rescale_betas_zero_snr goes with v_prediction). Use timestep_spacing 'leading', or a v_prediction model."
        )


def _refuse_unless_neutral(sampler: str, config: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    for option, values in supported.items():
        if option in config and config[option] not in values:
            raise UserError(
                f"The scheduler's {option} is {shown(repr(config[option]))}, which {sampler} does not support here; "
                f"expected {' or '.join(map(repr, values))}. Change it in scheduler_config.json, or choose another "
                "sampler."
            )


def _ddim_timesteps(schedule: NoiseSchedule, count: int) -> np.ndarray:
    """int64 [S], descending (Lin et al. 2023, Table 2)."""
    total = _checked_step_count(schedule, count)
    spacing = schedule.config.get("timestep_spacing", "leading")
    if spacing == "leading":
        timesteps = np.arange(count)[::-1] * (total // count) + schedule.config.get("steps_offset", 0)
    elif spacing == "linspace":
        timesteps = np.linspace(0, total - 1, count).round()[::-1].astype(np.int64)
    else:
        timesteps = _trailing_timesteps(spacing, total, count)
    return _checked_timesteps(schedule, timesteps)


def _unipc_timesteps(schedule: NoiseSchedule, count: int) -> np.ndarray:
    """int64 [S], descending: unlike DDIM's, leading and linspace leave out the last of count + 1 timesteps."""
    total = _checked_step_count(schedule, count)
    spacing = schedule.config.get("timestep_spacing", "linspace")
    if spacing == "leading":
        timesteps = np.arange(1, count + 1)[::-1] * (total // (count + 1)) + schedule.config.get("steps_offset", 0)
    elif spacing == "linspace":
        timesteps = np.linspace(0, total - 1, count + 1).round()[:0:-1].astype(np.int64)
    else:
        timesteps = _trailing_timesteps(spacing, total, count)
    return _checked_timesteps(schedule, timesteps)


def _trailing_timesteps(spacing: str, total: int, count: int) -> np.ndarray:
    if spacing != "trailing":
        raise UserError(
            f"The scheduler's timestep_spacing is {shown(repr(spacing))}; expected leading, linspace or trailing. "
            "Correct its scheduler_config.json."
        )
    return np.arange(total, 0, -total / count).round()[:count].astype(np.int64) - 1


def _checked_step_count(schedule: NoiseSchedule, count: int) -> int:
    """The number of training timesteps, of which sampling takes `count`."""
    total = schedule.num_train_timesteps
    if not 1 <= count <= total:
        raise UserError(f"The number of inference steps is {count}; expected 1 to {total}, the training timesteps.")
    return total


def _checked_timesteps(schedule: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    total = schedule.num_train_timesteps
    if timesteps[0] >= total or timesteps[-1] < 0 or (np.diff(timesteps) >= 0).any():
        raise UserError(
            f"{len(timesteps)} inference steps come to timesteps {timesteps[0]} … {timesteps[-1]}; expected distinct "
            f"ones between 0 and {total - 1}. Take fewer steps, or correct steps_offset in scheduler_config.json."
        )
    return timesteps


def _unipc_sigmas(schedule: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    """float64 [S + 1]: s/a at each timestep, and at the end."""
    alphas_bar = schedule.alphas_cumprod.astype(np.float64)
    if schedule.config.get("rescale_betas_zero_snr", False):
        alphas_bar[-1] = 2.0**-24  # diffusers' stand-in for zero, which keeps sigma finite
    with np.errstate(divide="ignore"):  # _refuse_undefined reports it in words
        sigmas = np.sqrt((1 - alphas_bar) / alphas_bar)
    chosen = sigmas[timesteps]
    stands_still = np.append(np.diff(chosen) >= 0, False)
    _refuse_undefined(timesteps, ~np.isfinite(chosen) | (chosen <= 0) | stands_still)
    final = schedule.config.get("final_sigmas_type", "zero")
    if final not in ("zero", "sigma_min"):
        raise UserError(
            f"The scheduler's final_sigmas_type is {shown(repr(final))}; expected zero or sigma_min. "
            "Correct its scheduler_config.json."
        )
    return np.append(chosen, sigmas[0] if final == "sigma_min" else 0.0)


def _signal_and_noise(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, s) of a variance-preserving process from sigma = s/a."""
    a = 1 / np.sqrt(np.square(sigmas) + 1)
    return a, sigmas * a


def _unipc_predictor(sigmas: np.ndarray, step: int, order: int) -> np.ndarray:
    """[4] UniP from `step` to `step + 1` (Zhao et al. 2023, Algorithm 2)."""
    a, s = _signal_and_noise(sigmas)
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
    a, s = _signal_and_noise(sigmas)
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
