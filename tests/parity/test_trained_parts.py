"""What is trained besides or instead of the whole ControlNet, and its average: the same in both backends."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel

from flax_trainer.base_models import BaseModels as FlaxBaseModels
from flax_trainer.base_models import FrozenParams
from flax_trainer.base_models import load_base_models as load_flax_models
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints as FlaxCheckpoints
from flax_trainer.checkpoints.orbax_checkpoints import check_same_arrays
from flax_trainer.checkpoints.result import result_to_save as flax_result_to_save
from flax_trainer.checkpoints.torch_checkpoint import read_torch_checkpoint
from flax_trainer.models import FlaxControlNetModel
from flax_trainer.models.params import from_torch_layout, to_torch_layout
from flax_trainer.training.optimizer import AdamWSettings
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import Objective as FlaxObjective
from flax_trainer.training.step import TrainStep, make_evaluation_step, make_train_step
from shared.checkpoints.policy import check_resumable, checkpoint_record
from shared.checkpoints.portable import AVERAGE_FILE
from shared.models.trained_parts import DOWN_RESIDUALS, UNET_PREFIX, split_trained
from tests.torch_trainer.tiny_training import (
    Changes,
    DiffusersTraining,
    Training,
    batch_of,
    configuration,
    relative_difference,
    schedule_of,
    slice_of,
    training_of,
)
from torch_trainer.base_models import load_base_models
from torch_trainer.checkpoints.safetensors_checkpoints import Checkpoints, result_to_save
from torch_trainer.evaluation.evaluator import Evaluator

STEPS = 6
RATE = 1e-3
VARIANTS: dict[str, Changes] = {
    "only_mid_control": {"only_mid_control": True},
    "sd_unlocked and use_ema": {"sd_unlocked": True, "use_ema": True},
    "all": {"use_ema": True, "sd_unlocked": True, "only_mid_control": True, "gradient_checkpointing": True},
    "sd_unlocked and use_ema, of XL": {"sd_unlocked": True, "use_ema": True},
}
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Variant:
    base_model: Path
    flags: Changes
    is_xl: bool

    def batch_of(self, count: int, seed: int) -> Arrays:
        return batch_of(count, seed, xl=self.is_xl)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, base_model: Path, xl_model: Path) -> Variant:
    is_xl = request.param.endswith("XL")
    return Variant(xl_model if is_xl else base_model, VARIANTS[request.param], is_xl)


@dataclass
class FlaxTraining:
    """The same training in Flax, from the same weights."""

    models: FlaxBaseModels
    objective: FlaxObjective
    frozen: FrozenParams
    step: TrainStep
    state: TrainState

    def to_torch(self, arrays: Arrays) -> Arrays:
        layouts = self.models.defs.trained_layouts
        return {name: to_torch_layout(np.asarray(value), layouts[name]) for name, value in arrays.items()}


def in_flax(training: Training, base_model: Path) -> FlaxTraining:
    config = training.config
    models, initial = load_flax_models(config, schedule_of(base_model))
    layouts = models.defs.trained_layouts
    params = {
        name: np.ascontiguousarray(from_torch_layout(value.numpy(), layouts[name]))
        for name, value in training.state.params().items()
    }
    assert params.keys() == initial.trained.keys()
    objective = FlaxObjective(
        models.schedule, np.ones(1000, np.float32), models.configs.vae.scaling_factor, jnp.dtype("float32")
    )
    settings = AdamWSettings(
        config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.adam_weight_decay, config.max_grad_norm
    )
    step = jax.jit(make_train_step(models.defs, objective, settings))
    return FlaxTraining(models, objective, initial.frozen, step, TrainState.create(params, averages=config.use_ema))


def numpy_of(tensors: dict[str, torch.Tensor]) -> Arrays:
    return {name: value.numpy() for name, value in tensors.items()}


def distance(given: Arrays, expected: Arrays, of: Arrays) -> float:
    """‖given - expected‖ / ‖of‖ over all parameters."""
    assert given.keys() == expected.keys() == of.keys()
    apart = sum(float(np.square(given[name] - value).sum()) for name, value in expected.items())
    return (apart / sum(float(np.square(value).sum()) for value in of.values())) ** 0.5


# --- both backends ---------------------------------------------------------------------------------------------------


def test_both_backends_train_the_same_and_continue_each_other(tmp_path: Path, variant: Variant) -> None:
    """Losses, norms, weights, moments, averages; the figures on held-out samples; checkpoints both ways, exactly."""
    training = training_of(variant.base_model, **variant.flags)
    flax = in_flax(training, variant.base_model)
    start = numpy_of(training.state.params())
    for seed in range(STEPS):
        batch = variant.batch_of(2, seed)
        loss, norm = training.step(batch, RATE)
        flax.state, metrics = flax.step(flax.state, flax.frozen, batch, np.float32(RATE))
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-3)

    params, moments, average = training.state.tensors()
    moved = {name: value.numpy() - start[name] for name, value in params.items()}
    assert distance(numpy_of(params), flax.to_torch(flax.state.params), of=moved) < 1e-2
    for kind, of_flax in (("exp_avg", flax.state.mu), ("exp_avg_sq", flax.state.nu)):
        given = {name: kinds[kind].numpy() for name, kinds in moments.items()}
        assert distance(given, flax.to_torch(of_flax), of=given) < 1e-3
    assert bool(average) == bool(flax.state.ema) == ("use_ema" in variant.flags)
    if average:
        assert distance(numpy_of(average), flax.to_torch(flax.state.ema), of=moved) < 1e-2
    _assert_same_evaluation(training, flax, slice_of(variant.batch_of(4, 99), 0))

    record = record_of(training)
    flax_checkpoints = FlaxCheckpoints(tmp_path / "flax", keep=None)
    flax_checkpoints.save(jax.tree.map(np.asarray, flax.state), record)
    flax_checkpoints.close()
    checkpoints = checkpoints_of(training, tmp_path / "torch")
    checkpoints.save(STEPS, record)
    checkpoints.wait()

    fresh = TrainState.create(
        {name: np.array(value) for name, value in flax.state.params.items()}, averages=bool(average)
    )
    in_flax_now, saved_record = read_torch_checkpoint(
        tmp_path / "torch" / f"checkpoint-{STEPS}", flax.models.defs.trained_layouts
    )
    check_resumable(tmp_path, saved_record, record)
    check_same_arrays(tmp_path, in_flax_now, fresh)
    for arrived, sent in (
        (in_flax_now.params, params),
        (in_flax_now.ema, average),
        (in_flax_now.mu, {name: kinds["exp_avg"] for name, kinds in moments.items()}),
    ):
        assert_same(flax.to_torch(arrived), numpy_of(sent))

    resumed = training_of(variant.base_model, **variant.flags)
    checkpoints_of(resumed, tmp_path / "resumed").restore(tmp_path / "flax" / f"checkpoint-{STEPS}")
    tensors = resumed.state.tensors()
    assert_same(numpy_of(tensors.params), flax.to_torch(flax.state.params))
    assert_same(numpy_of(tensors.average), flax.to_torch(flax.state.ema))
    assert_same(
        {name: kinds["exp_avg"].numpy() for name, kinds in tensors.optimizer.items()}, flax.to_torch(flax.state.mu)
    )
    batch = variant.batch_of(2, STEPS)
    loss, _ = resumed.step(batch, RATE)
    flax.state, metrics = flax.step(flax.state, flax.frozen, batch, np.float32(RATE))
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)
    if average:
        given, expected = numpy_of(resumed.state.tensors().average), flax.to_torch(flax.state.ema)
        assert distance(given, expected, of=moved) < 1e-2


def _assert_same_evaluation(training: Training, flax: FlaxTraining, rows: Arrays) -> None:
    """With the averaged weights, where there are any, and the trained decoder."""
    evaluate = jax.jit(make_evaluation_step(flax.models.defs, flax.objective))
    expected = evaluate(flax.state.result, flax.frozen, rows)
    before = numpy_of(training.state.params())
    given = evaluator_of(training).models_in_training().per_sample_losses(rows)
    np.testing.assert_allclose(given, expected, rtol=1e-3)
    assert_same(numpy_of(training.state.params()), before)
    if flax.state.ema:
        unaveraged = evaluate(flax.state.params, flax.frozen, rows)
        assert np.abs(given - expected).max() < 0.1 * np.abs(unaveraged - expected).max()


def evaluator_of(training: Training) -> Evaluator:
    sampler: Any = None  # makes no images
    return Evaluator(
        training.accelerator, training.models, training.train_step.objective, sampler, training.train_step.average
    )


def checkpoints_of(training: Training, folder: Path) -> Checkpoints:
    folder.mkdir(exist_ok=True)
    return Checkpoints(training.accelerator, training.models.controlnet, training.state, folder, None)


def record_of(training: Training) -> dict[str, Any]:
    return checkpoint_record(training.config, {"location": ["a.tar"], "samples": 8}, 2)


def assert_same(given: Arrays, expected: Arrays) -> None:
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(given[name], value, err_msg=name)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, variant: Variant) -> None:
    whole = training_of(variant.base_model, **variant.flags)
    for seed in range(4):
        whole.step(variant.batch_of(2, seed), RATE)
        if seed == 1:
            checkpoints = checkpoints_of(whole, tmp_path)
            checkpoints.save(2, record_of(whole))
            checkpoints.wait()
    expected = whole.state.tensors()
    resumed = training_of(variant.base_model, **variant.flags)
    checkpoints_of(resumed, tmp_path / "resumed").restore(tmp_path / "checkpoint-2")
    for seed in (2, 3):
        resumed.step(variant.batch_of(2, seed), RATE)
    given = resumed.state.tensors()
    assert_same(numpy_of(given.params), numpy_of(expected.params))
    assert_same(numpy_of(given.average), numpy_of(expected.average))


# --- the average -----------------------------------------------------------------------------------------------------


def test_the_average_is_that_of_diffusers_emamodel(base_model: Path) -> None:
    training = training_of(base_model, use_ema=True)
    reference = EMAModel(training.controlnet.parameters())
    for seed in range(5):
        training.step(batch_of(2, seed), RATE)
        reference.step(training.controlnet.parameters())
    average = training.state.tensors().average
    shadows = zip(training.controlnet.named_parameters(), reference.shadow_params, strict=True)
    for (name, _), expected in shadows:
        assert torch.equal(average[name], expected), name
    assert not all(torch.equal(average[name], param) for name, param in training.controlnet.named_parameters())


@pytest.mark.parametrize("first", [0, 8, 80_000, 89_990])
def test_both_averages_decay_as_emamodel_does(first: int) -> None:
    """From the first steps to where the decay has reached its largest value."""
    from flax_trainer.training.optimizer import average_update
    from torch_trainer.training.weight_average import WeightAverage

    param = torch.nn.Parameter(torch.zeros(4))
    reference = EMAModel([param])
    reference.optimization_step = first
    ours = WeightAverage({"w": param})
    ours.load({"w": param}, first)
    in_flax = {"w": jnp.zeros(4)}
    random = torch.Generator().manual_seed(first)
    for step in range(first + 1, first + 21):
        param.data = torch.randn(4, generator=random)
        reference.step([param])
        ours.update(torch.tensor(0.0))
        in_flax = average_update(in_flax, {"w": jnp.asarray(param.detach().numpy())}, jnp.int32(step))
    assert torch.equal(ours.means["w"], reference.shadow_params[0])
    np.testing.assert_allclose(in_flax["w"], reference.shadow_params[0], rtol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_the_trained_weights_come_back_after_the_average_was_in_their_place(base_model: Path, fails: bool) -> None:
    training = training_of(base_model, use_ema=True)
    for seed in range(3):
        training.step(batch_of(2, seed), RATE)
    params, _, average = training.state.tensors()
    assert training.train_step.average is not None
    try:
        with training.train_step.average.in_place():
            assert_same(numpy_of(training.state.params()), numpy_of(average))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert_same(numpy_of(training.state.params()), numpy_of(params))


def test_a_checkpoint_that_has_lost_its_average_is_refused(base_model: Path, tmp_path: Path) -> None:
    training = training_of(base_model, use_ema=True)
    training.step(batch_of(2), RATE)
    checkpoints = checkpoints_of(training, tmp_path)
    checkpoints.save(1, record_of(training))
    checkpoints.wait()
    (tmp_path / "checkpoint-1" / AVERAGE_FILE).unlink()
    with pytest.raises(ValueError, match=r"moving average of 0 parameters.*Resume from another checkpoint"):
        checkpoints.restore(tmp_path / "checkpoint-1")


def test_a_step_that_is_not_taken_does_not_move_the_average(base_model: Path) -> None:
    training = training_of(base_model, use_ema=True)
    for seed in range(2):
        training.step(batch_of(2, seed), RATE)
    before = numpy_of(training.state.tensors().average)
    training.step(batch_of(2) | {"noise": np.full((1, 2, 8, 8, 4), np.nan, np.float32)}, RATE)
    assert_same(numpy_of(training.state.tensors().average), before)


# --- sd_unlocked -----------------------------------------------------------------------------------------------------


class UnlockedDiffusersTraining(DiffusersTraining):
    """diffusers' loop, which trains the UNet's decoder too."""

    def __init__(self, base_model: Path, controlnet: torch.nn.Module):
        super().__init__(base_model, controlnet)
        for module in (self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out):
            module.requires_grad_(True)


def test_the_decoder_is_trained_as_diffusers_would(base_model: Path) -> None:
    training = training_of(base_model, sd_unlocked=True, max_grad_norm=0.05)
    reference = UnlockedDiffusersTraining(base_model, training.controlnet)
    decoder = [param for param in reference.unet.parameters() if param.requires_grad]
    trained = [*reference.controlnet.parameters(), *decoder]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=training.config.adam_weight_decay)
    encoder = copy.deepcopy({n: p for n, p in training.models.unet.named_parameters() if not p.requires_grad})
    for seed in range(3):
        batch = batch_of(2, seed)
        expected = reference.loss(slice_of(batch, 0))
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(trained, 0.05).item()
        optimizer.step()
        optimizer.zero_grad()
        loss, norm = training.step(batch, RATE)
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
    _, given = split_trained(training.state.params())
    wanted = {name: param for name, param in reference.unet.named_parameters() if param.requires_grad}
    assert given.keys() == wanted.keys()
    assert {name.split(".")[0] for name in given} == {"up_blocks", "conv_norm_out", "conv_out"}
    for name, param in wanted.items():
        assert relative_difference(given[name], param.detach()) < 1e-3, name
    for name, param in training.models.unet.named_parameters():
        assert name in given or torch.equal(param, encoder[name]), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_decoder_is_kept_in_float32(base_model: Path, precision: str) -> None:
    config = configuration(base_model, sd_unlocked=True, mixed_precision=precision)
    training = training_of(base_model, sd_unlocked=True, mixed_precision=precision)
    training.step(batch_of(2), RATE)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for name, param in training.models.unet.named_parameters():
        assert param.dtype == (torch.float32 if param.requires_grad else dtype), name
    _, initial = load_flax_models(config, schedule_of(base_model))
    assert {value.dtype for value in initial.trained.values()} == {np.dtype("float32")}
    assert not initial.frozen.unet.keys() & initial.decoder.keys()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_both_save_a_whole_unet_that_diffusers_loads(base_model: Path, tmp_path: Path, precision: str) -> None:
    """The frozen part as it was in the base model, whatever it was rounded to for computing."""
    training = training_of(base_model, sd_unlocked=True, mixed_precision=precision)
    training.step(batch_of(2), RATE)
    params = training.state.params()
    for save in result_to_save(training.config, training.controlnet, params).values():
        save(tmp_path / "torch")
    models, _ = load_flax_models(training.config, schedule_of(base_model))
    _, decoder = split_trained(params)
    layouts = models.defs.trained_layouts
    result = {name: from_torch_layout(value.numpy(), layouts[name]) for name, value in params.items()}
    for save in flax_result_to_save(training.config, models, result).values():
        save(tmp_path / "flax")
    base = diffusers.UNet2DConditionModel.from_pretrained(base_model / "unet")
    for folder in ("torch", "flax"):
        saved = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / folder / "unet")
        assert saved.dtype == torch.float32
        assert saved.config.block_out_channels == base.config.block_out_channels
        for name, param in saved.named_parameters():
            assert torch.equal(param, decoder.get(name, base.get_parameter(name))), name
    assert not torch.equal(saved.conv_out.weight, base.conv_out.weight)
    loaded = diffusers.ControlNetModel.from_pretrained(tmp_path / "torch")
    assert_same(numpy_of(loaded.state_dict()), numpy_of({n: p for n, p in params.items() if UNET_PREFIX not in n[:5]}))


# --- only_mid_control ------------------------------------------------------------------------------------------------


def controlnet_with_residuals(base_model: Path, folder: Path) -> Path:
    """One that was trained before: none of its residuals is zero."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(base_model / "unet")
    controlnet = diffusers.ControlNetModel.from_unet(unet)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in controlnet.parameters():
            param += 0.02 * torch.randn(param.shape, generator=random)
    controlnet.save_pretrained(folder)
    return folder


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO):
        yield caplog


def test_the_saved_controlnet_does_the_same_in_diffusers(
    base_model: Path, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    """Which adds the residuals of all blocks: here from a ControlNet whose residuals were not zero."""
    existing = str(controlnet_with_residuals(base_model, tmp_path / "existing"))
    training = training_of(base_model, awake=False, only_mid_control=True, controlnet_model_name_or_path=existing)
    assert [record.message for record in told.records if "only_mid_control" in record.message] == [
        f"--only_mid_control: the residuals of the down blocks of {existing} are set to zero and stay so."
    ]
    for seed in range(2):
        training.step(batch_of(2, seed), RATE)
    params = training.state.params()
    for save in result_to_save(training.config, training.controlnet, params).values():
        save(tmp_path / "result")

    loaded = diffusers.ControlNetModel.from_pretrained(tmp_path / "result")
    silent = {name: param for name, param in loaded.named_parameters() if name.startswith(DOWN_RESIDUALS)}
    assert silent
    assert not any(param.any() for param in silent.values())
    rows = slice_of(batch_of(2, seed=5), 0)
    by_diffusers = DiffusersTraining(base_model, loaded).loss(rows).item()
    assert evaluator_of(training)._losses(rows).mean() == pytest.approx(by_diffusers, rel=1e-5)
    alone = DiffusersTraining(base_model, loaded).loss(rows, controlled=False).item()
    assert abs(by_diffusers - alone) > 1e-3 * alone

    flax = in_flax(training, base_model)
    FlaxControlNetModel.save_params(
        tmp_path / "flax", flax.models.configs.controlnet, flax.state.params, flax.models.defs.controlnet.layouts
    )
    again = diffusers.ControlNetModel.from_pretrained(tmp_path / "flax")
    assert_same(numpy_of(again.state_dict()), numpy_of(loaded.state_dict()))


def test_flax_zeroes_the_residuals_of_an_existing_controlnet_too(
    base_model: Path, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    existing = str(controlnet_with_residuals(base_model, tmp_path))
    config = configuration(base_model, only_mid_control=True, controlnet_model_name_or_path=existing)
    _, initial = load_flax_models(config, schedule_of(base_model))
    for name, value in initial.controlnet.items():
        assert value.any() != name.startswith(DOWN_RESIDUALS), name
    assert sum("are set to zero" in record.message for record in told.records) == 1
    assert load_base_models(config, torch.float32).controlnet.controlnet_mid_block.weight.any()


def test_a_new_controlnet_needs_no_notice(base_model: Path, told: pytest.LogCaptureFixture) -> None:
    config = configuration(base_model, only_mid_control=True)
    load_flax_models(config, schedule_of(base_model))
    load_base_models(config, torch.float32)
    assert not [record for record in told.records if not record.name.startswith("diffusers.")]


def test_nothing_is_computed_for_the_other_residuals(base_model: Path) -> None:
    """Neither the zero convolutions nor their gradients: fewer convolutions than with them."""
    counts = {}
    for only_mid_control in (False, True):
        config = configuration(base_model, only_mid_control=only_mid_control)
        models, initial = load_flax_models(config, schedule_of(base_model))
        objective = FlaxObjective(models.schedule, np.ones(1000, np.float32), 1.0, jnp.dtype("float32"))
        rows = slice_of(batch_of(2), 0)
        evaluate = make_evaluation_step(models.defs, objective)
        program = str(jax.make_jaxpr(evaluate)(initial.trained, initial.frozen, rows))
        counts[only_mid_control] = program.count("conv_general_dilated[")
        residuals = sum(name.startswith(DOWN_RESIDUALS) for name in initial.controlnet) // 2
    assert counts[False] - counts[True] == residuals > 0
