import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from shared.diffusion.schedule import (
    NoiseSchedule,
    add_noise,
    gather,
    predicted_noise,
    predicted_x0,
    training_target,
    velocity,
)

BETAS: list[dict[str, Any]] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.3, "num_train_timesteps": 51},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    {},
]


def diffusers_alphas_cumprod(config: dict[str, Any]) -> np.ndarray:
    return DDPMScheduler.from_config(config).alphas_cumprod.numpy()


@pytest.mark.parametrize("config", BETAS)
def test_tables_are_those_of_diffusers(config: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_config(config)
    expected = diffusers_alphas_cumprod(config)
    assert schedule.num_train_timesteps == len(expected)
    for table, reference in (
        (schedule.alphas_cumprod, expected),
        (schedule.sqrt_alphas_cumprod, np.sqrt(expected)),
        (schedule.sqrt_one_minus_alphas_cumprod, np.sqrt(1 - expected)),
    ):
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, reference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", [config for config in BETAS if "trained_betas" not in config])
def test_zero_terminal_snr_is_that_of_diffusers(config: dict[str, Any]) -> None:
    config = config | {"rescale_betas_zero_snr": True}
    ours, theirs = NoiseSchedule.from_config(config).alphas_cumprod, diffusers_alphas_cumprod(config)
    assert ours[-1] == theirs[-1] == 0
    assert ours[0] == pytest.approx(diffusers_alphas_cumprod(config | {"rescale_betas_zero_snr": False})[0])
    # Differences are of the size of float32's rounding of the values before the subtraction that makes the end zero.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-7)


def test_formulas_are_those_of_diffusers_for_every_kind_of_array() -> None:
    random = np.random.default_rng(0)
    x0, noise = random.standard_normal((2, 4, 3, 3, 2), dtype=np.float32)
    timesteps = np.array([0, 400, 998, 999])
    config = {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}
    schedule, scheduler = NoiseSchedule.from_config(config), DDPMScheduler.from_config(config)
    reference = [torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(timesteps)]
    for array in (np.asarray, jnp.asarray, torch.from_numpy):
        a = gather(array(schedule.sqrt_alphas_cumprod), array(timesteps))
        s = gather(array(schedule.sqrt_one_minus_alphas_cumprod), array(timesteps))
        noisy, target = add_noise(array(x0), array(noise), a, s), velocity(array(x0), array(noise), a, s)
        assert type(noisy) is type(array(x0))
        np.testing.assert_allclose(noisy, scheduler.add_noise(*reference), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(target, scheduler.get_velocity(*reference), rtol=1e-5, atol=1e-6)


@given(
    prediction_type=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    alpha_bar=st.floats(0.01, 0.99),
    x0=st.floats(-3, 3),
    noise=st.floats(-3, 3),
)
def test_predictions_undo_targets(prediction_type: Any, alpha_bar: float, x0: float, noise: float) -> None:
    a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    x_t = add_noise(x0, noise, a, s)
    target = training_target(prediction_type, x0, noise, a, s)
    assert predicted_x0(prediction_type, target, x_t, a, s) == pytest.approx(x0, abs=1e-12)
    assert predicted_noise(prediction_type, target, x_t, a, s) == pytest.approx(noise, abs=1e-12)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"beta_schedule": "sigmoid"}, "'sigmoid'; expected one of linear"),
        ({"prediction_type": "flow"}, "'flow'; expected one of epsilon, v_prediction, sample"),
        ({"trained_betas": [0.1], "num_train_timesteps": 2}, "1 trained_betas"),
        ({"beta_end": 1.5}, r"\[0, 1\)"),
        ({"num_train_timesteps": 0}, "positive"),
    ],
)
def test_configurations_that_make_no_schedule_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        NoiseSchedule.from_config(config)


def test_a_folder_that_diffusers_saved_is_read(tmp_path: Path) -> None:
    scheduler: Any = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1)
    scheduler.save_pretrained(tmp_path / "scheduler")
    schedule = NoiseSchedule.from_pretrained(tmp_path)
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=1e-6)
    assert schedule.prediction_type == "v_prediction"
    assert schedule.config["steps_offset"] == 1


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no subfolder 'scheduler'\. Subfolders there: none"):
        NoiseSchedule.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'nobody/nothing' is not a local folder.* scheduler_config\.json of nobody"):
        NoiseSchedule.from_pretrained("nobody/nothing", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="is not a local folder"):
        NoiseSchedule.from_pretrained("/no/such/folder", cache_dir=tmp_path / "cache")
    (tmp_path / "scheduler").mkdir()
    with pytest.raises(ValueError, match=r"scheduler has no scheduler_config\.json"):
        NoiseSchedule.from_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        NoiseSchedule.from_pretrained(tmp_path)


def test_a_cached_hub_repository_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / ("0" * 40) / "scheduler"
    snapshot.mkdir(parents=True)
    (snapshot / "scheduler_config.json").write_text(json.dumps({"num_train_timesteps": 7}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert NoiseSchedule.from_pretrained("someone/model", cache_dir=tmp_path).num_train_timesteps == 7
