"""Whole training runs in PyTorch: flags that only this backend has. `test_training_run.py` has what concerns both."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shared.checkpoints.portable import OPTIMIZER_FILE
from tests.end_to_end.support.running import losses, train_torch_here, untimed_metrics
from tests.end_to_end.support.tiny_runs import STEPS, arguments


@pytest.fixture(scope="module")
def plain(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without any of the flags."""
    output_dir = tmp_path_factory.mktemp("plain")
    train_torch_here(arguments(base_model, output_dir))
    return output_dir


def optimizer_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoint-{step}" / OPTIMIZER_FILE)


def test_a_schedule_that_cannot_be_sampled_trains_without_pictures(
    base_model: Path, plain: Path, tmp_path: Path
) -> None:
    """`test_setup_and_result.py` has what is said where pictures are asked for."""
    model = shutil.copytree(base_model, tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_karras_sigmas": True}))
    train_torch_here(arguments(model, tmp_path / "run", "--max_train_steps", 1))
    assert losses(tmp_path / "run") == losses(plain)[:1]


def test_gradient_checkpointing_changes_no_number(base_model: Path, plain: Path, tmp_path: Path) -> None:
    train_torch_here(arguments(base_model, tmp_path, "--gradient_checkpointing", "--max_train_steps", 4))
    np.testing.assert_allclose(losses(tmp_path), losses(plain)[:4], rtol=1e-6)


def test_freed_gradients_change_no_number(base_model: Path, plain: Path, tmp_path: Path) -> None:
    train_torch_here(arguments(base_model, tmp_path, "--set_grads_to_none"))
    assert untimed_metrics(tmp_path) == untimed_metrics(plain)


def test_8_bit_adam_trains_and_resumes_bit_for_bit(base_model: Path, plain: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_torch_here(arguments(base_model, whole, "--use_8bit_adam"))
    state = optimizer_state(whole, STEPS)
    assert sum(value.dtype == torch.uint8 for value in state.values()) > 40
    # The first step starts from the same weights; later ones follow at the distance of the rounded moments.
    assert losses(whole)[0] == losses(plain)[0]
    np.testing.assert_allclose(losses(whole), losses(plain), rtol=0.1)

    train_torch_here(arguments(base_model, parts, "--use_8bit_adam", "--max_train_steps", 4))
    train_torch_here(arguments(base_model, parts, "--use_8bit_adam", "--resume_from_checkpoint", "latest"))
    assert losses(parts) == losses(whole)
    trained = [diffusers.ControlNetModel.from_pretrained(folder).state_dict() for folder in (whole, parts)]
    for before, after in (trained, (state, optimizer_state(parts, STEPS))):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(after[name], value), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_compiled_models_give_the_same_losses_and_resume(
    base_model: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of torch.compile but its C++ compiler, which takes minutes where Dynamo and AOTAutograd take seconds."""
    compiled = []

    def compile_quickly(model: torch.nn.Module) -> None:
        compiled.append(type(model).__name__)
        compile_module(model, backend="aot_eager")

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    train_torch_here(arguments(base_model, tmp_path, "--torch_compile", "--max_train_steps", 2))
    assert sorted(compiled) == ["CLIPTextModel", "ControlNetModel", "Encoder", "UNet2DConditionModel"]
    monkeypatch.undo()
    train_torch_here(arguments(base_model, tmp_path, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"))
    np.testing.assert_allclose(losses(tmp_path), losses(plain)[:4], rtol=1e-5)
