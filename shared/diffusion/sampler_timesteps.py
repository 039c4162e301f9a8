"""Which noise levels a sampler steps through: timesteps and sigmas, in numpy.

S inference steps. sigma = s/a of the schedule, what diffusers' schedulers call sigma too.
"""

import numpy as np

from shared.diffusion.schedule import NoiseSchedule
from shared.untrusted import shown
from shared.user_errors import UserError


def ddim_timesteps(schedule: NoiseSchedule, count: int) -> np.ndarray:
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


def unipc_timesteps(schedule: NoiseSchedule, count: int) -> np.ndarray:
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


def euler_timesteps(schedule: NoiseSchedule, count: int) -> np.ndarray:
    """int64 [S], descending, as DDIM's; float32 with linspace, which Euler's method does not round."""
    total = _checked_step_count(schedule, count)
    if schedule.config.get("timestep_spacing", "linspace") != "linspace":
        return ddim_timesteps(schedule, count)
    return _checked_timesteps(schedule, np.linspace(0, total - 1, count, dtype=np.float32)[::-1])


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


def sigmas_at(schedule: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    """float64 [S + 1]: s/a at each timestep, between whole ones by linear interpolation, and at the end."""
    alphas_bar = schedule.alphas_cumprod.astype(np.float64)
    if schedule.config.get("rescale_betas_zero_snr", False):
        alphas_bar[-1] = 2.0**-24  # diffusers' stand-in for zero, which keeps sigma finite
    with np.errstate(divide="ignore"):  # refuse_undefined reports it in words
        sigmas = np.sqrt((1 - alphas_bar) / alphas_bar)
    whole = np.issubdtype(timesteps.dtype, np.integer)
    chosen = sigmas[timesteps] if whole else np.interp(timesteps, np.arange(len(sigmas)), sigmas)
    stands_still = np.append(np.diff(chosen) >= 0, False)
    refuse_undefined(timesteps, ~np.isfinite(chosen) | (chosen <= 0) | stands_still)
    final = schedule.config.get("final_sigmas_type", "zero")
    if final not in ("zero", "sigma_min"):
        raise UserError(
            f"The scheduler's final_sigmas_type is {shown(repr(final))}; expected zero or sigma_min. "
            "Correct its scheduler_config.json."
        )
    return np.append(chosen, sigmas[0] if final == "sigma_min" else 0.0)


def signal_and_noise(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, s) of a variance-preserving process from sigma = s/a."""
    a = 1 / np.sqrt(np.square(sigmas) + 1)
    return a, sigmas * a


def refuse_undefined(timesteps: np.ndarray, undefined: np.ndarray) -> None:
    if undefined.any():
        raise UserError(
            f"Sampling is undefined at timestep {timesteps[undefined][0]}: the network's output cannot be turned into "
            "a clean sample there, because the schedule has no signal or no noise left at that timestep "
            "(rescale_betas_zero_snr goes with v_prediction). Use timestep_spacing 'leading', or a v_prediction model."
        )
