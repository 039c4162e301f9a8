"""Weights of the loss by timestep. T training timesteps."""

import numpy as np

from shared.diffusion.schedule import NoiseSchedule
from shared.user_errors import UserError


def loss_weights(schedule: NoiseSchedule, snr_gamma: float | None) -> np.ndarray:
    """What `--snr_gamma` asks for, float32 [T]: Min-SNR weights, or the same weight for all where it is None."""
    if snr_gamma is None:
        return np.ones(schedule.num_train_timesteps, np.float32)
    return min_snr_weights(schedule, snr_gamma)


def min_snr_weights(schedule: NoiseSchedule, gamma: float) -> np.ndarray:
    """Min-SNR weight of each timestep, float32 [T] (Hang et al. 2023, "Efficient Diffusion Training…", section 3.4).

    With snr = a²/s² and capped = min(snr, gamma), and depending on what the network predicts: capped for the sample,
    capped/snr for the noise, capped/(snr + 1) for the velocity. Written so that SNR 0 (zero-terminal
    schedules) divides nothing by zero: there the weights are 0, 1 and 0, the formulas' limits.

    Raises:
        UserError: gamma is not a positive number.
    """
    if not gamma > 0:
        raise UserError(f"snr_gamma is {gamma}; expected a positive number, 5.0 in the paper.")
    signal = schedule.alphas_cumprod.astype(np.float64)
    noise = 1 - signal
    if schedule.prediction_type == "epsilon":
        weights = np.divide(gamma * noise, signal, out=np.ones_like(signal), where=gamma * noise < signal)
    elif schedule.prediction_type == "v_prediction":
        weights = np.minimum(signal, gamma * noise)
    else:
        weights = np.divide(signal, noise, out=np.full_like(signal, gamma), where=signal < gamma * noise)
    return weights.astype(np.float32)
