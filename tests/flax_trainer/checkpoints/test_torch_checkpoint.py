"""A run that the PyTorch backend began goes on in Flax: the whole state, exactly."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch

from flax_trainer.base_models import load_base_models
from flax_trainer.checkpoints.orbax_checkpoints import check_same_arrays
from flax_trainer.checkpoints.torch_checkpoint import is_torch_checkpoint, read_torch_checkpoint
from flax_trainer.models.params import from_torch_layout
from flax_trainer.training.state import TrainState
from shared.checkpoints.policy import check_resumable, checkpoint_record
from shared.config import TrainConfig
from shared.eight_bit_moments import dequantised, from_bitsandbytes
from tests.torch_trainer.tiny_training import Training, batch_of, configuration, schedule_of, training_of
from torch_trainer.checkpoints.safetensors_checkpoints import Checkpoints
from torch_trainer.distributed.trainable_state import StateTensors

STEPS = 3
RECORD = checkpoint_record(
    TrainConfig(pretrained_model_name_or_path="some/model"), {"location": ["a.tar"], "samples": 8}, 8
)


class Expected(NamedTuple):
    """What Flax has of the same base model."""

    fresh: TrainState
    layouts: Mapping[str, str]


@pytest.fixture(scope="module")
def expected(base_model: Path) -> Expected:
    models, initial = load_base_models(configuration(base_model), schedule_of(base_model))
    return Expected(TrainState.create(initial.controlnet), models.defs.controlnet.layouts)


def save(training: Training, directory: Path) -> tuple[Path, StateTensors]:
    """After a few steps."""
    for seed in range(STEPS):
        training.step(batch_of(2, seed), 1e-3)
    checkpoints = Checkpoints(training.accelerator, training.models.controlnet, training.state, directory, None)
    checkpoints.save(STEPS, RECORD)
    checkpoints.wait()
    return directory / f"checkpoint-{STEPS}", training.state.tensors()


@pytest.fixture
def saved(base_model: Path, tmp_path: Path) -> tuple[Path, StateTensors]:
    return save(training_of(base_model), tmp_path)


def test_weights_moments_and_step_arrive_exactly(saved: tuple[Path, StateTensors], expected: Expected) -> None:
    checkpoint, (params, moments, _) = saved
    assert is_torch_checkpoint(checkpoint)
    state, record = read_torch_checkpoint(checkpoint, expected.layouts)
    check_same_arrays(checkpoint, state, expected.fresh)
    check_resumable(checkpoint, record, RECORD)
    assert int(state.step) == STEPS
    assert not bool(state.non_finite)

    def in_flax(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {name: from_torch_layout(value.numpy(), expected.layouts[name]) for name, value in tensors.items()}

    for given, wanted in (
        (state.params, params),
        (state.mu, {name: kinds["exp_avg"] for name, kinds in moments.items()}),
        (state.nu, {name: kinds["exp_avg_sq"] for name, kinds in moments.items()}),
    ):
        assert given.keys() == wanted.keys()
        for name, value in in_flax(wanted).items():
            np.testing.assert_array_equal(given[name], value, err_msg=name)
            assert np.any(value), "all zero, which would say nothing"


def test_the_state_is_ready_for_the_devices(saved: tuple[Path, StateTensors], expected: Expected) -> None:
    state, _ = read_torch_checkpoint(saved[0], expected.layouts)
    assert jax.tree.structure(state) == jax.tree.structure(expected.fresh)
    for given, fresh in zip(jax.tree.leaves(state), jax.tree.leaves(expected.fresh), strict=True):
        assert isinstance(given, np.ndarray)
        assert given.flags.c_contiguous
        assert (given.dtype, given.shape) == (fresh.dtype, fresh.shape)


@pytest.mark.parametrize("precision_now", ["fp16", "no"])
def test_the_loss_scale_arrives_where_it_is_used(
    base_model: Path, tmp_path: Path, expected: Expected, precision_now: str
) -> None:
    training = training_of(base_model)
    training.step(batch_of(2), 1e-3)
    training.accelerator.scaler = torch.amp.GradScaler("cpu")
    training.accelerator.scaler.load_state_dict(
        training.accelerator.scaler.state_dict() | {"scale": 512.0, "_growth_tracker": 77}
    )
    checkpoints = Checkpoints(training.accelerator, training.models.controlnet, training.state, tmp_path, None)
    checkpoints.save(1, RECORD)
    checkpoints.wait()
    fresh = TrainState.create(expected.fresh.params, scales_loss=precision_now == "fp16")
    state, _ = read_torch_checkpoint(tmp_path / "checkpoint-1", expected.layouts)
    state = state.with_loss_scaler_of(fresh)
    check_same_arrays(tmp_path / "checkpoint-1", state, fresh)
    if precision_now == "fp16":
        assert (float(state.loss_scaler["scale"]), int(state.loss_scaler["growth_tracker"])) == (512.0, 77)
    else:
        assert state.loss_scaler == {}


def test_without_a_saved_loss_scale_it_is_the_one_that_runs_begin_with(
    saved: tuple[Path, StateTensors], expected: Expected
) -> None:
    state, _ = read_torch_checkpoint(saved[0], expected.layouts)
    assert state.loss_scaler == {}
    state = state.with_loss_scaler_of(TrainState.create(expected.fresh.params, scales_loss=True))
    assert (float(state.loss_scaler["scale"]), int(state.loss_scaler["growth_tracker"])) == (65536.0, 0)


def test_a_controlnet_of_another_architecture_is_refused(saved: tuple[Path, StateTensors], expected: Expected) -> None:
    """With the message that a checkpoint of our own gets."""
    other = {name: value for name, value in expected.fresh.params.items() if name != "conv_in.bias"}
    layouts = {name: layout for name, layout in expected.layouts.items() if name != "conv_in.bias"}
    state, _ = read_torch_checkpoint(saved[0], layouts)
    with pytest.raises(ValueError, match=r"checkpoint-3 belongs to a ControlNet of another architecture; 3 arrays"):
        check_same_arrays(saved[0], state, TrainState.create(other))


def test_8_bit_moments_arrive_but_for_their_rounding(base_model: Path, tmp_path: Path, expected: Expected) -> None:
    checkpoint, (params, kept, _) = save(training_of(base_model, use_8bit_adam=True), tmp_path)
    like = TrainState.create(expected.fresh.params, eight_bits=True)
    state, _ = read_torch_checkpoint(checkpoint, expected.layouts, like)
    check_same_arrays(checkpoint, state, like)
    assert len(state.mu_scales) > 20
    for number, (moments, scales) in enumerate(((state.mu, state.mu_scales), (state.nu, state.nu_scales)), start=1):
        for name, moment in moments.items():
            arrays = {kind: value.numpy() for kind, value in kept[name].items()}
            meant = from_torch_layout(from_bitsandbytes(arrays, number, params[name].shape), expected.layouts[name])
            if name in scales:
                moment = dequantised(moment, scales[name], signed=number == 1)
                assert np.linalg.norm(moment - meant) < 0.05 * np.linalg.norm(meant), name
            else:
                np.testing.assert_array_equal(moment, meant, err_msg=name)


@pytest.mark.parametrize("saved_with", [False, True])
def test_moments_of_the_other_optimizer_are_refused(
    base_model: Path, tmp_path: Path, expected: Expected, saved_with: bool
) -> None:
    checkpoint, _ = save(training_of(base_model, use_8bit_adam=saved_with), tmp_path)
    like = TrainState.create(expected.fresh.params, eight_bits=not saved_with)
    told = r"saved with --use_8bit_adam.* Add that flag" if saved_with else r"without --use_8bit_adam.* Leave out that"
    with pytest.raises(ValueError, match=told):
        read_torch_checkpoint(checkpoint, expected.layouts, like)


def test_damaged_files_are_found_and_named(saved: tuple[Path, StateTensors], expected: Expected) -> None:
    checkpoint, _ = saved
    for file in ("controlnet/diffusion_pytorch_model.safetensors", "optimizer.safetensors", "training_state.json"):
        path = checkpoint / file
        whole = path.read_bytes()
        for size in (0, 5, len(whole) // 2, len(whole) - 2):
            os.truncate(path, size)
            with pytest.raises(ValueError, match=f"checkpoint-{STEPS}/{file}"):
                read_torch_checkpoint(checkpoint, expected.layouts)
            path.write_bytes(whole)
        path.unlink()
        with pytest.raises(ValueError, match=f"checkpoint-{STEPS}"):
            read_torch_checkpoint(checkpoint, expected.layouts)
        path.write_bytes(whole)
    read_torch_checkpoint(checkpoint, expected.layouts)
