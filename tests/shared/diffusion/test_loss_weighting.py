from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from shared.diffusion.loss_weighting import min_snr_weights
from shared.diffusion.schedule import NoiseSchedule

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
def test_weights_follow_the_paper_with_diffusers_snr(prediction_type: str, zero_terminal: bool, gamma: float) -> None:
    config = SD | {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_terminal}
    weights = min_snr_weights(NoiseSchedule.from_config(config), gamma)
    snr = compute_snr(DDPMScheduler.from_config(config), torch.arange(1000)).double().numpy()
    capped = np.minimum(snr, gamma)
    with np.errstate(invalid="ignore"):
        expected = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[prediction_type]
    if zero_terminal:
        assert weights[-1] == {"epsilon": 1, "v_prediction": 0, "sample": 0}[prediction_type]
    assert weights.dtype == np.float32
    assert weights.shape == (1000,)
    assert np.isfinite(weights).all()
    known = np.isfinite(expected)
    np.testing.assert_allclose(weights[known], expected[known], rtol=2e-5, atol=1e-9)


def test_weights_by_hand() -> None:
    """One step of beta 0.2 leaves a² = 0.8, hence an SNR of 4; two leave 0.64 and 16/9."""
    config: dict[str, Any] = {"trained_betas": [0.2, 0.2], "num_train_timesteps": 2}
    schedules = {kind: NoiseSchedule.from_config(config | {"prediction_type": kind}) for kind in ("epsilon", "sample")}
    np.testing.assert_allclose(min_snr_weights(schedules["epsilon"], 2.0), [0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(min_snr_weights(schedules["sample"], 2.0), [2.0, 16 / 9], rtol=1e-6)
    velocity = NoiseSchedule.from_config(config | {"prediction_type": "v_prediction"})
    np.testing.assert_allclose(min_snr_weights(velocity, 2.0), [0.4, 0.64], rtol=1e-6)


def test_a_noiseless_timestep_has_finite_weights() -> None:
    config: dict[str, Any] = {"trained_betas": [0.0, 0.5], "num_train_timesteps": 2}
    for kind, first in {"epsilon": 0.0, "v_prediction": 0.0, "sample": 3.0}.items():
        assert min_snr_weights(NoiseSchedule.from_config(config | {"prediction_type": kind}), 3.0)[0] == first


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_gamma_must_be_positive(gamma: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        min_snr_weights(NoiseSchedule.from_config(SD), gamma)
