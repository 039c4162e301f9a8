"""Min-SNR weights in the Flax step: every sample by its own timestep, at any batch size, prediction and schedule.

The models are stand-ins of a line each, so that nothing but the objective is measured; PyTorch computes the same loss
with diffusers' scheduler and `compute_snr`.
"""

from typing import Any

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr

from flax_trainer.training.optimizer import AdamWSettings
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import Objective, make_train_step
from shared.diffusion.loss_weighting import min_snr_weights
from shared.diffusion.schedule import NoiseSchedule
from tests.flax_trainer.training.stand_in_models import NOTHING_FROZEN, STAND_INS
from tests.torch_trainer.tiny_training import batch_of

GAMMA = 5.0
WEIGHT = 0.7
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SETTINGS = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, max_grad_norm=float("inf"))


def reference(batch: dict[str, np.ndarray], scheduler: dict[str, Any], weight: torch.Tensor) -> torch.Tensor:
    """The weighted loss of a batch [B, ...], written with diffusers' parts."""
    schedule = diffusers.DDPMScheduler.from_config(scheduler)
    timesteps = torch.from_numpy(batch["timesteps"]).long()
    pixels = torch.from_numpy(batch["pixel_values"][:, ::8, ::8]).float() / 127.5 - 1
    latents = torch.nn.functional.pad(pixels, (0, 1)) + 0.1 * torch.from_numpy(batch["vae_noise"])
    noise = torch.from_numpy(batch["noise"])
    noisy = schedule.add_noise(latents, noise, timesteps)
    condition = torch.from_numpy(batch["conditioning_pixel_values"][:, ::8, ::8, :1]).float() / 255
    prediction = 0.3 * noisy + weight * condition
    prediction_type = scheduler["prediction_type"]
    target = {"epsilon": noise, "sample": latents, "v_prediction": schedule.get_velocity(latents, noise, timesteps)}
    snr = compute_snr(schedule, timesteps)
    weights = torch.minimum(snr, torch.full_like(snr, GAMMA))
    weights = weights / {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[prediction_type]
    weights = torch.where(weights.isnan(), 1.0, weights)  # diffusers has 0/0 for the noise at SNR 0; the limit is 1
    per_sample = torch.nn.functional.mse_loss(prediction, target[prediction_type], reduction="none").mean(dim=(1, 2, 3))
    return (weights * per_sample).mean()


@pytest.mark.parametrize("zero_terminal", [False, True], ids=["usual end", "zero-terminal"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_loss_and_gradient_are_those_of_diffusers(count: int, prediction_type: str, zero_terminal: bool) -> None:
    scheduler = SCHEDULER | {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_terminal}
    schedule = NoiseSchedule.from_config(scheduler)
    objective = Objective(schedule, min_snr_weights(schedule, GAMMA), 1.0, jnp.dtype("float32"))
    # SNR from far above 5 to far below, and the last timestep, where it may be 0.
    spread = np.linspace(0, 999, count).round().astype(np.int32) if count > 2 else np.array([999, 100])[:count]
    rows = batch_of(count) | {"timesteps": spread.astype(np.int32)[None]}

    state = TrainState.create({"weight": np.array(WEIGHT, np.float32)})
    step = make_train_step(STAND_INS, objective, SETTINGS)
    after, metrics = step(state, NOTHING_FROZEN, rows, np.float32(0))

    weight = torch.tensor(WEIGHT, requires_grad=True)
    loss = reference({name: array[0] for name, array in rows.items()}, scheduler, weight)
    loss.backward()
    assert weight.grad is not None
    assert np.isfinite(loss.item())
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-4)
    assert float(after.mu["weight"]) == pytest.approx(0.1 * weight.grad.item(), rel=1e-4, abs=1e-7)


def test_the_reference_weighs_at_all() -> None:
    scheduler = SCHEDULER | {"prediction_type": "epsilon"}
    rows = {name: array[0] for name, array in batch_of(4).items()}
    last, first = (
        reference(rows | {"timesteps": np.full(4, timestep, np.int32)}, scheduler, torch.tensor(WEIGHT)).item()
        for timestep in (999, 0)
    )
    assert first < 0.05 * last
