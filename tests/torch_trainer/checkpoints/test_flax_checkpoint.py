"""A run that the Flax backend began goes on in PyTorch: the whole state, exactly."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from flax_trainer.base_models import load_base_models as load_flax_models
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints as FlaxCheckpoints
from flax_trainer.models.controlnet import FlaxControlNetModel
from flax_trainer.models.params import CONV, LINEAR, PLAIN, split, to_torch_layout, torch_shape
from flax_trainer.training.state import TrainState
from shared.checkpoints.policy import checkpoint_record
from shared.config import TrainConfig
from shared.eight_bit_moments import from_bitsandbytes
from shared.models.configs.unet import ControlNetConfig
from tests.flax_trainer.models.unet_reference import (
    TINY_SD1,
    TINY_SD2,
    TINY_SDXL,
    json_config,
    torch_controlnet,
    torch_unet,
)
from tests.torch_trainer.tiny_training import batch_of, configuration, schedule_of, training_of
from torch_trainer.checkpoints.flax_checkpoint import is_flax_checkpoint, read_flax_checkpoint, read_flax_record
from torch_trainer.checkpoints.safetensors_checkpoints import Checkpoints, checkpoint_record_of

STEP = 7
RECORD = checkpoint_record(
    TrainConfig(pretrained_model_name_or_path="some/model"), {"location": ["a.tar"], "samples": 8}, 8
)
Arrays = dict[str, np.ndarray]


class Saved(NamedTuple):
    """A checkpoint of the Flax backend and what is in it, in PyTorch's layouts."""

    checkpoint: Path
    params: Arrays
    exp_avg: Arrays
    exp_avg_sq: Arrays


def random_arrays(shapes: dict[str, tuple[int, ...]], seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def saved(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    models, initial = load_flax_models(configuration(base_model), schedule_of(base_model))
    shapes = {name: value.shape for name, value in initial.controlnet.items()}
    trees = [random_arrays(shapes, seed) for seed in range(2)]
    trees.append({name: value**2 for name, value in random_arrays(shapes, 2).items()})
    folder = tmp_path_factory.mktemp("flax-run")
    checkpoints = FlaxCheckpoints(folder, keep=None)
    checkpoints.save(TrainState(np.array(STEP, np.int32), *trees, non_finite=np.array(False)), RECORD)
    checkpoints.close()
    layouts = models.defs.controlnet.layouts
    in_torch = ({name: to_torch_layout(value, layouts[name]) for name, value in tree.items()} for tree in trees)
    return Saved(folder / f"checkpoint-{STEP}", *in_torch)


def assert_same(given: Arrays, expected: Arrays) -> None:
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(given[name]), value, err_msg=name)
        assert np.asarray(given[name]).dtype == np.float32


def test_weights_moments_and_step_arrive_exactly(base_model: Path, tmp_path: Path, saved: Saved) -> None:
    training = training_of(base_model)
    checkpoints = Checkpoints(training.accelerator, training.models.controlnet, training.state, tmp_path, None)
    checkpoints.restore(saved.checkpoint)
    params, moments, _ = training.state.tensors()
    assert_same({name: value.numpy() for name, value in params.items()}, saved.params)
    for kind, expected in (("exp_avg", saved.exp_avg), ("exp_avg_sq", saved.exp_avg_sq)):
        assert_same({name: kinds[kind].numpy() for name, kinds in moments.items()}, expected)
    assert {float(kinds["step"]) for kinds in training.optimizer.state.values()} == {float(STEP)}


@pytest.mark.parametrize(
    ("loss_scaler", "expected"),
    [
        pytest.param({"scale": np.float32(512), "growth_tracker": np.int32(77)}, (512.0, 77), id="float16"),
        pytest.param({}, (65536.0, 0), id="another precision"),
    ],
)
def test_the_loss_scale_arrives(
    base_model: Path, tmp_path: Path, loss_scaler: Arrays, expected: tuple[float, int]
) -> None:
    _, initial = load_flax_models(configuration(base_model), schedule_of(base_model))
    flax_checkpoints = FlaxCheckpoints(tmp_path / "flax", keep=None)
    scaler_arrays = {name: np.asarray(value) for name, value in loss_scaler.items()}
    flax_checkpoints.save(TrainState.create(initial.controlnet)._replace(loss_scaler=scaler_arrays), RECORD)
    flax_checkpoints.close()
    training = training_of(base_model)
    training.accelerator.scaler = torch.amp.GradScaler("cpu")
    checkpoints = Checkpoints(training.accelerator, training.models.controlnet, training.state, tmp_path, None)
    checkpoints.restore(tmp_path / "flax" / "checkpoint-0")
    state = training.accelerator.scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == expected
    assert state["growth_interval"] == 2000


def test_adamw_goes_on_from_there(base_model: Path, tmp_path: Path, saved: Saved) -> None:
    """Its next step is that of a PyTorch optimizer which has the same moments by its own means."""
    training = training_of(base_model)
    Checkpoints(training.accelerator, training.models.controlnet, training.state, tmp_path, None).restore(
        saved.checkpoint
    )
    batch = batch_of(2)
    gradients: dict[str, torch.Tensor] = {}
    for name, param in training.controlnet.named_parameters():
        param.register_hook(lambda gradient, name=name: gradients.__setitem__(name, gradient.clone()))
    _, norm = training.step(batch, 1e-3)
    clip = min(1.0, training.config.max_grad_norm / norm)
    for name, param in training.controlnet.named_parameters():
        gradient = gradients[name].numpy() * clip
        mean = 0.9 * saved.exp_avg[name] + 0.1 * gradient
        square = 0.999 * saved.exp_avg_sq[name] + 0.001 * gradient**2
        root = np.sqrt(square / (1 - 0.999 ** (STEP + 1)))
        direction = mean / (1 - 0.9 ** (STEP + 1)) / (root + training.config.adam_epsilon)
        expected = saved.params[name] * (1 - 1e-3 * training.config.adam_weight_decay) - 1e-3 * direction
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_record_arrives(saved: Saved) -> None:
    assert is_flax_checkpoint(saved.checkpoint)
    assert checkpoint_record_of(saved.checkpoint) == RECORD


def test_8_bit_adam_cannot_take_whole_moments(base_model: Path, tmp_path: Path, saved: Saved) -> None:
    training = training_of(base_model, use_8bit_adam=True)
    checkpoints = Checkpoints(training.accelerator, training.models.controlnet, training.state, tmp_path, None)
    with pytest.raises(ValueError, match=r"without --use_8bit_adam.*Leave out that flag"):
        checkpoints.restore(saved.checkpoint)


@pytest.fixture(scope="module")
def saved_in_8_bits(base_model: Path, saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint `saved`, by a run with --use_8bit_adam."""
    _, initial = load_flax_models(configuration(base_model), schedule_of(base_model))
    fresh = TrainState.create(initial.controlnet)
    checkpoints = FlaxCheckpoints(saved.checkpoint.parent, keep=None, read_only=True)
    folder = tmp_path_factory.mktemp("flax-run")
    writer = FlaxCheckpoints(folder, keep=None)
    writer.save(checkpoints.restore(STEP, fresh).with_moments_in_eight_bits(), RECORD)
    writer.close()
    return folder / f"checkpoint-{STEP}"


def test_8_bit_moments_arrive_but_for_their_rounding(
    base_model: Path, tmp_path: Path, saved: Saved, saved_in_8_bits: Path
) -> None:
    training = training_of(base_model, use_8bit_adam=True)
    checkpoints = Checkpoints(training.accelerator, training.models.controlnet, training.state, tmp_path, None)
    checkpoints.restore(saved_in_8_bits)
    large = 0
    for name, param in training.controlnet.named_parameters():
        np.testing.assert_array_equal(param.detach().numpy(), saved.params[name], err_msg=name)
        state = training.optimizer.state[param]
        arrays = {kind: value.numpy() for kind, value in state.items() if isinstance(value, torch.Tensor)}
        large += arrays["state1"].dtype == np.uint8
        for number, meant in ((1, saved.exp_avg[name]), (2, saved.exp_avg_sq[name])):
            moment = from_bitsandbytes(arrays, number, meant.shape)
            assert np.linalg.norm(moment - meant) < 0.05 * np.linalg.norm(meant), name
    assert large > 20
    loss, norm = training.step(batch_of(2), 1e-3)
    assert np.isfinite([loss, norm]).all()


def test_adamw_cannot_take_moments_of_8_bits(base_model: Path, tmp_path: Path, saved_in_8_bits: Path) -> None:
    training = training_of(base_model)
    checkpoints = Checkpoints(training.accelerator, training.models.controlnet, training.state, tmp_path, None)
    with pytest.raises(ValueError, match=r"saved with --use_8bit_adam.*Add that flag"):
        checkpoints.restore(saved_in_8_bits)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(TINY_SD1, id="sd1"), pytest.param(TINY_SD2, id="sd2"), pytest.param(TINY_SDXL, id="sdxl")],
)
def test_layouts_follow_from_ranks(architecture: dict[str, Any]) -> None:
    """Reading goes by rank, which needs no table of the model's layouts; here the table is asked."""
    controlnet = torch_controlnet(torch_unet(architecture))
    definition, abstract = split(FlaxControlNetModel.abstract(ControlNetConfig.from_dict(json_config(controlnet))))
    ranks = {CONV: {4}, LINEAR: {2}, PLAIN: {0, 1}}
    for name, value in abstract.items():
        layout = definition.layouts[name]
        assert len(value.shape) in ranks[layout], name
        assert torch_shape(value.shape, layout) == tuple(controlnet.state_dict()[name].shape)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["emptied", "truncated", "deleted"])
def test_damaged_files_are_found_and_the_folder_is_named(saved: Saved, tmp_path: Path, kind: str) -> None:
    """Each file in turn; what still reads without it must be right."""
    files = sorted(path.relative_to(saved.checkpoint) for path in saved.checkpoint.rglob("*") if path.is_file())
    refused: dict[str, str] = {}
    for number, file in enumerate(files):
        copy = Path(shutil.copytree(saved.checkpoint, tmp_path / str(number) / f"checkpoint-{STEP}"))
        path = copy / file
        if kind == "deleted":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2 if kind == "truncated" else 0)
        try:
            assert checkpoint_record_of(copy) == RECORD
            step, params, moments, *_ = read_flax_checkpoint(copy)
        except ValueError as error:
            refused[str(file)] = str(error)
            continue
        assert step == STEP
        assert_same(params, saved.params)
        assert_same({name: kinds["exp_avg"] for name, kinds in moments.items()}, saved.exp_avg)
        assert_same({name: kinds["exp_avg_sq"] for name, kinds in moments.items()}, saved.exp_avg_sq)
    for file, message in refused.items():
        assert f"checkpoint-{STEP}" in message, file
        assert "tensorstore_spec" not in message
        assert len(message) < 1500
    assert {"record/metadata", "state/manifest.ocdbt"} <= refused.keys()
    assert any("/d/" in file for file in refused), "a data file went missing unnoticed"


def test_a_record_that_is_gone_is_named(saved: Saved, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved.checkpoint, tmp_path / saved.checkpoint.name))
    shutil.rmtree(copy / "record")
    with pytest.raises(ValueError, match=r"record/metadata cannot be read"):
        read_flax_record(copy)
