"""The training step against the same training written with diffusers' and PyTorch's own parts."""

from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPTextModel

from flax_trainer.base_models import BaseModels, InitialParams, load_base_models
from flax_trainer.models.adapter import from_torch_layout
from flax_trainer.optimizer import AdamWSettings
from flax_trainer.state import TrainState
from flax_trainer.step import FrozenParams, Objective, TrainStep, make_evaluation_step, make_train_step
from shared.config import TrainConfig
from shared.diffusion.loss_weighting import min_snr_weights
from shared.diffusion.schedule import NoiseSchedule

SETTINGS = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, max_grad_norm=0.1)
LEARNING_RATE = 1e-3
STEPS = 3


def config(base_model: Path, **changes: object) -> TrainConfig:
    return TrainConfig(pretrained_model_name_or_path=str(base_model), **changes)


def load(config: TrainConfig) -> tuple[BaseModels, InitialParams]:
    return load_base_models(config, NoiseSchedule.from_pretrained(str(config.pretrained_model_name_or_path)))


def batch_of(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of noise, [count, ...]; a step wants leading axes [accumulation slices, rows]."""
    rng = np.random.default_rng(seed)
    return {
        "pixel_values": rng.integers(0, 256, (count, 64, 64, 3), np.uint8),
        "conditioning_pixel_values": rng.integers(0, 256, (count, 64, 64, 3), np.uint8),
        "input_ids": rng.integers(0, 500, (count, 77), np.int32),
        "vae_noise": rng.standard_normal((count, 8, 8, 4), np.float32),
        "noise": rng.standard_normal((count, 8, 8, 4), np.float32),
        "timesteps": rng.integers(0, 1000, count, np.int32),
    }


def in_slices(batch: dict[str, np.ndarray], slices: int) -> dict[str, np.ndarray]:
    return {name: value.reshape(slices, -1, *value.shape[1:]) for name, value in batch.items()}


def objective(models: BaseModels, snr_gamma: float | None = None, dtype: str = "float32") -> Objective:
    weights = np.ones(1000, np.float32) if snr_gamma is None else min_snr_weights(models.schedule, snr_gamma)
    return Objective(models.schedule, weights, models.configs.vae.scaling_factor, jnp.dtype(dtype))


@pytest.fixture(scope="module")
def loaded(base_model: Path) -> tuple[BaseModels, InitialParams]:
    return load(config(base_model))


@pytest.fixture(scope="module")
def step(loaded: tuple[BaseModels, InitialParams]) -> TrainStep:
    models, _ = loaded
    return jax.jit(make_train_step(models.defs, objective(models), SETTINGS))


class TorchReference:
    """A ControlNet training of diffusers' models, written as its guide describes it."""

    def __init__(self, base_model: Path):
        self.vae = diffusers.AutoencoderKL.from_pretrained(base_model / "vae")
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(base_model / "unet")
        self.text_encoder = CLIPTextModel.from_pretrained(base_model / "text_encoder")
        self.scheduler = diffusers.DDPMScheduler.from_pretrained(base_model / "scheduler")
        self.controlnet = diffusers.ControlNetModel.from_unet(self.unet)
        self.unet.requires_grad_(False)

    def loss(
        self, batch: dict[str, np.ndarray], *, controlled: bool = True, snr_gamma: float | None = None
    ) -> torch.Tensor:
        def channels_first(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).movedim(-1, 1).float()

        with torch.no_grad():
            posterior = self.vae.encode(channels_first(batch["pixel_values"]) / 127.5 - 1).latent_dist
            latents = posterior.mean + posterior.std * channels_first(batch["vae_noise"])
            latents = latents * self.vae.config.scaling_factor
            text = self.text_encoder(torch.from_numpy(batch["input_ids"]).long())[0]
        noise, timesteps = channels_first(batch["noise"]), torch.from_numpy(batch["timesteps"]).long()
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        residuals = {}
        if controlled:
            condition = channels_first(batch["conditioning_pixel_values"]) / 255
            down, mid = self.controlnet(noisy, timesteps, text, condition, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        prediction = self.unet(noisy, timesteps, text, **residuals).sample
        per_sample = (prediction - noise).square().mean(dim=(1, 2, 3))
        if snr_gamma is not None:
            snr = diffusers.training_utils.compute_snr(self.scheduler, timesteps)
            per_sample = per_sample * torch.minimum(snr, torch.full_like(snr, snr_gamma)) / snr
        return per_sample.mean()


def torch_values(reference: TorchReference, models: BaseModels) -> dict[str, np.ndarray]:
    layouts = models.defs.controlnet.layouts
    return {
        name: from_torch_layout(value.detach().numpy(), layouts[name])
        for name, value in reference.controlnet.named_parameters()
    }


def relative_difference(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(ours) - reference) / max(np.linalg.norm(reference), 1e-12))


def test_a_batch_may_bring_what_the_frozen_encoders_make_of_it(
    base_model: Path, loaded: tuple[BaseModels, InitialParams]
) -> None:
    """diffusers' VAE and transformers' text encoder made it here; the losses are those of the batch of pixels."""
    models, initial = loaded
    reference, batch = TorchReference(base_model), batch_of(4)
    with torch.no_grad():
        pixels = torch.from_numpy(batch["pixel_values"]).movedim(-1, 1).float() / 127.5 - 1
        posterior = reference.vae.encode(pixels).latent_dist
        text = reference.text_encoder(torch.from_numpy(batch["input_ids"]).long())[0]
    encoded = {name: value for name, value in batch.items() if name not in ("pixel_values", "input_ids")} | {
        "latent_mean": posterior.mean.movedim(1, -1).numpy(),
        "latent_std": posterior.std.movedim(1, -1).numpy(),
        "prompt_embeds": text.numpy(),
    }
    evaluate = jax.jit(make_evaluation_step(models.defs, objective(models)))
    without_encoders = FrozenParams(initial.frozen.unet, {}, {})
    np.testing.assert_allclose(
        evaluate(initial.controlnet, without_encoders, encoded),
        evaluate(initial.controlnet, initial.frozen, batch),
        rtol=1e-5,
    )


def test_training_follows_diffusers_step_for_step(
    base_model: Path, loaded: tuple[BaseModels, InitialParams], step: TrainStep
) -> None:
    """Same start, same batches: losses, gradient norms and every parameter after three clipped AdamW steps."""
    models, initial = loaded
    reference = TorchReference(base_model)
    state = TrainState.create({name: value.copy() for name, value in torch_values(reference, models).items()})
    optimizer = torch.optim.AdamW(
        reference.controlnet.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )
    for index in range(STEPS):
        batch = batch_of(4, seed=index)
        state, metrics = step(state, initial.frozen, in_slices(batch, 1), np.float32(LEARNING_RATE))
        loss = reference.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(reference.controlnet.parameters(), SETTINGS.max_grad_norm)
        optimizer.step()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(grad_norm.item(), rel=1e-4)
    assert int(state.step) == STEPS
    for name, expected in torch_values(reference, models).items():
        # Adam divides by the gradient's own size, so rounding of gradients near zero moves single weights by up to lr.
        assert relative_difference(state.params[name], expected) < 1e-3, name


def test_loss_of_step_zero_is_the_base_models(
    base_model: Path, loaded: tuple[BaseModels, InitialParams], step: TrainStep
) -> None:
    """Zero convolutions: an untrained ControlNet changes nothing, whatever the condition."""
    _, initial = loaded
    batch = batch_of(4)
    _, metrics = step(TrainState.create(initial.controlnet), initial.frozen, in_slices(batch, 1), np.float32(0))
    assert float(metrics["loss"]) == pytest.approx(
        TorchReference(base_model).loss(batch, controlled=False).item(), rel=1e-5
    )


def test_min_snr_weights_each_sample(base_model: Path, loaded: tuple[BaseModels, InitialParams]) -> None:
    models, initial = loaded
    batch = batch_of(4) | {"timesteps": np.array([10, 100, 500, 900], np.int32)}  # SNR from far above 5 to far below
    weighted = jax.jit(make_train_step(models.defs, objective(models, snr_gamma=5.0), SETTINGS))
    _, metrics = weighted(TrainState.create(initial.controlnet), initial.frozen, in_slices(batch, 1), np.float32(0))
    expected = TorchReference(base_model).loss(batch, snr_gamma=5.0).item()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(TorchReference(base_model).loss(batch).item(), rel=1e-2)


def test_accumulated_slices_equal_one_batch(loaded: tuple[BaseModels, InitialParams], step: TrainStep) -> None:
    _, initial = loaded
    batch, state = batch_of(4), TrainState.create(initial.controlnet)
    whole, whole_metrics = step(state, initial.frozen, in_slices(batch, 1), np.float32(LEARNING_RATE))
    sliced, sliced_metrics = step(state, initial.frozen, in_slices(batch, 4), np.float32(LEARNING_RATE))
    assert float(sliced_metrics["loss"]) == pytest.approx(float(whole_metrics["loss"]), rel=1e-5)
    assert float(sliced_metrics["grad_norm"]) == pytest.approx(float(whole_metrics["grad_norm"]), rel=1e-4)
    for name, value in whole.mu.items():
        assert relative_difference(sliced.mu[name], np.asarray(value)) < 1e-4, name
    assert int(sliced.step) == int(whole.step) == 1


def test_a_non_finite_loss_freezes_the_state(loaded: tuple[BaseModels, InitialParams], step: TrainStep) -> None:
    """Later, finite batches must not move what was last good: they may already be on their way."""
    _, initial = loaded
    start = TrainState.create(initial.controlnet)
    poisoned = batch_of(4) | {"noise": np.full((4, 8, 8, 4), np.nan, np.float32)}
    bad, metrics = step(start, initial.frozen, in_slices(poisoned, 1), np.float32(LEARNING_RATE))
    assert np.isnan(float(metrics["loss"]))
    after, metrics = step(bad, initial.frozen, in_slices(batch_of(4), 1), np.float32(LEARNING_RATE))
    assert np.isfinite(float(metrics["loss"]))
    assert bool(after.halted)
    assert int(after.step) == 0
    for name, value in start.params.items():
        np.testing.assert_array_equal(after.params[name], value)


def test_bf16_computes_in_bf16_and_keeps_the_controlnet_in_float32(base_model: Path) -> None:
    models, initial = load(config(base_model, mixed_precision="bf16"))
    assert {value.dtype.name for params in initial.frozen for value in params.values()} == {"bfloat16"}
    bf16 = jax.jit(make_train_step(models.defs, objective(models, dtype="bfloat16"), SETTINGS))
    batch = batch_of(4)
    state, metrics = bf16(TrainState.create(initial.controlnet), initial.frozen, in_slices(batch, 1), np.float32(1e-3))
    assert {value.dtype.name for value in state.params.values()} == {"float32"}
    exact = TorchReference(base_model).loss(batch).item()
    assert float(metrics["loss"]) == pytest.approx(exact, rel=0.03)
    assert float(metrics["loss"]) != pytest.approx(exact, rel=1e-6)


def test_the_step_is_given_its_frozen_models(loaded: tuple[BaseModels, InitialParams]) -> None:
    """Frozen parameters are arguments: baked in as constants they would be compiled in and copied per device."""
    models, initial = loaded
    abstract = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype),
        (TrainState.create(initial.controlnet), initial.frozen, in_slices(batch_of(2), 1)),
    )
    jaxpr = jax.make_jaxpr(make_train_step(models.defs, objective(models), SETTINGS))(*abstract, jnp.float32(0))
    baked_in = sum(np.asarray(constant).nbytes for constant in jaxpr.consts)
    assert baked_in < sum(value.nbytes for value in initial.frozen.unet.values()) / 10
    assert isinstance(initial.frozen, FrozenParams)
