"""What the PyTorch backend reads from its base model, and what it refuses to start from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from flax_trainer.base_models import load_base_models as load_flax_models
from flax_trainer.models.params import to_torch_layout
from tests.torch_trainer.tiny_training import configuration, schedule_of
from torch_trainer.base_models import BaseModels, load_base_models

UNET_WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")


def load(base_model: Path, **changes: Any) -> BaseModels:
    return load_base_models(configuration(base_model, **changes), torch.float32)


def refusal(base_model: Path, **changes: Any) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the callers look at the message)
        load(base_model, **changes)
    return str(refused.value)


@pytest.fixture
def changeable(base_model: Path, tmp_path: Path) -> Path:
    """A copy of the base model to break."""
    return Path(shutil.copytree(base_model, tmp_path / "model"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def set_in(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tiny_controlnet(**changes: Any) -> ControlNetModel:
    settings: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "conditioning_embedding_out_channels": (4, 8, 8, 8),
    }
    return ControlNetModel(**(settings | changes))


# --- how a run starts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_the_controlnet_starts_as_flax_starts_it_bit_for_bit(base_model: Path, seed: int) -> None:
    flax_models, initial = load_flax_models(configuration(base_model, seed=seed), schedule_of(base_model))
    layouts = flax_models.defs.controlnet.layouts
    params = dict(load(base_model, seed=seed).controlnet.named_parameters())
    assert params.keys() == initial.controlnet.keys()
    for name, param in params.items():
        expected = to_torch_layout(initial.controlnet[name], layouts[name])
        np.testing.assert_array_equal(param.detach().numpy(), expected, err_msg=name)


def test_the_seed_decides_what_is_no_copy_and_nothing_else_does(base_model: Path) -> None:
    torch.manual_seed(1)
    first = load(base_model, seed=1).controlnet.state_dict()
    torch.manual_seed(2)
    again, other = (load(base_model, seed=seed).controlnet.state_dict() for seed in (1, 2))
    different = {name for name, value in first.items() if not torch.equal(value, other[name])}
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert different
    assert all(name.startswith("controlnet_cond_embedding.") for name in different)


def test_only_the_controlnet_is_trained_and_in_float32(base_model: Path) -> None:
    models = load_base_models(configuration(base_model), torch.bfloat16)
    assert models.controlnet.training
    assert all(param.requires_grad and param.dtype == torch.float32 for param in models.controlnet.parameters())
    for model in (models.unet, models.vae, models.text_encoder):
        assert not model.training
        assert all(not param.requires_grad and param.dtype == torch.bfloat16 for param in model.parameters())


def test_latents_are_as_much_smaller_as_the_vae_makes_them(base_model: Path) -> None:
    models = load(base_model)
    side, same_side, channels = models.latent_shape(96)
    encoded = models.vae.encode(torch.zeros(1, 3, 96, 96)).latent_dist.mean
    assert (1, channels, side, same_side) == tuple(encoded.shape)


def test_a_saved_controlnet_is_the_start(base_model: Path, tmp_path: Path) -> None:
    controlnet = tiny_controlnet()
    controlnet.save_pretrained(tmp_path)
    loaded = load(base_model, controlnet_model_name_or_path=str(tmp_path)).controlnet
    assert loaded.training
    assert all(torch.equal(value, controlnet.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_half_precision_controlnet_is_trained_in_float32(base_model: Path, tmp_path: Path) -> None:
    controlnet = tiny_controlnet().half()
    controlnet.save_pretrained(tmp_path)
    loaded = load(base_model, controlnet_model_name_or_path=str(tmp_path)).controlnet
    for name, param in loaded.named_parameters():
        assert param.dtype == torch.float32
        assert torch.equal(param, controlnet.state_dict()[name].float())


def test_another_vae_takes_the_place_of_the_base_models(base_model: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(base_model / "vae"))
    vae.save_pretrained(tmp_path)
    loaded = load(base_model, pretrained_vae_model_name_or_path=str(tmp_path)).vae
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in loaded.state_dict().items())
    own = load(base_model).vae.state_dict()
    assert not torch.equal(own["decoder.conv_in.weight"], vae.state_dict()["decoder.conv_in.weight"])


# --- variants --------------------------------------------------------------------------------------------------------


@pytest.fixture
def half_precision(changeable: Path) -> Path:
    """A base model that has nothing but fp16 files."""
    for path in changeable.rglob("*.safetensors"):
        halved = {name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()}
        save_file(halved, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        path.unlink()
    return changeable


def test_fp16_files_are_read_as_float32(base_model: Path, half_precision: Path) -> None:
    whole, halved = load(base_model), load(half_precision, variant="fp16")
    for kind in ("unet", "vae", "text_encoder"):
        expected = getattr(whole, kind).state_dict()
        for name, param in getattr(halved, kind).named_parameters():
            assert param.dtype == torch.float32
            assert torch.equal(param, expected[name].half().float()), name
    copied = "down_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(halved.controlnet.state_dict()[copied], halved.unet.state_dict()[copied])


def test_a_variant_that_is_not_there(base_model: Path, half_precision: Path) -> None:
    message = refusal(base_model, variant="fp16")
    assert str(base_model / "unet") in message
    assert "fp16" in message
    message = refusal(half_precision)
    assert str(half_precision / "unet") in message
    assert "--variant" in message


# --- weights and configurations that do not belong together ----------------------------------------------------------


def test_missing_weights_are_named(changeable: Path) -> None:
    rewrite(changeable / UNET_WEIGHTS, lambda tensors: tensors.pop("conv_in.bias"))
    message = refusal(changeable)
    assert str(changeable / "unet") in message
    assert "UNet2DConditionModel" in message
    assert "1 missing: conv_in.bias" in message


def test_unexpected_weights_are_named(changeable: Path) -> None:
    rewrite(changeable / UNET_WEIGHTS, lambda tensors: tensors.update(lora=torch.zeros(1)))
    message = refusal(changeable)
    assert str(changeable / "unet") in message
    assert "1 unexpected: lora" in message


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_weights_of_another_shape_are_named(changeable: Path, kind: str) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        name = "conv_in.weight" if kind == "unet" else "decoder.conv_in.weight"
        tensors[name] = tensors[name][:, :2].contiguous()

    rewrite(changeable / kind / UNET_WEIGHTS.name, narrow)
    message = refusal(changeable)
    assert str(changeable / kind) in message
    assert "conv_in.weight" in message


def test_a_text_encoder_without_all_of_its_weights_is_refused(changeable: Path) -> None:
    name = "text_model.embeddings.position_embedding.weight"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        found = [key for key in tensors if key.endswith("position_embedding.weight")]
        assert len(found) == 1, (name, list(tensors))
        del tensors[found[0]]

    rewrite(changeable / "text_encoder" / "model.safetensors", drop)
    message = refusal(changeable)
    assert str(changeable / "text_encoder") in message
    assert "position_embedding.weight" in message


@pytest.mark.parametrize("size", [0, 300, 50_000])
@pytest.mark.parametrize("path", [UNET_WEIGHTS, Path("text_encoder/model.safetensors")], ids=lambda path: path.parts[0])
def test_truncated_files_are_named(changeable: Path, path: Path, size: int) -> None:
    weights = changeable / path
    weights.write_bytes(weights.read_bytes()[:size])
    message = refusal(changeable)
    assert str(weights.parent) in message
    assert "\n" not in message


def test_a_git_lfs_pointer_is_no_model(changeable: Path) -> None:
    (changeable / UNET_WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "a" + "\nsize 3438167540\n"
    )
    assert str(changeable / "unet") in refusal(changeable)


@pytest.mark.parametrize("kind", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("flag", ["controlnet_model_name_or_path", "pretrained_vae_model_name_or_path"])
def test_a_model_of_another_kind_is_refused(base_model: Path, flag: str, kind: str) -> None:
    if (flag, kind) == ("pretrained_vae_model_name_or_path", "vae"):
        assert load(base_model, **{flag: str(base_model / kind)}).vae is not None
        return
    message = refusal(base_model, **{flag: str(base_model / kind)})
    assert str(base_model / kind) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [("controlnet_model_name_or_path", "no/such/folder"), ("pretrained_vae_model_name_or_path", "neither this")],
)
def test_a_model_that_is_nowhere_is_named(base_model: Path, flag: str, value: str) -> None:
    assert value in refusal(base_model, **{flag: value})


def test_a_part_of_the_base_model_that_is_not_there_is_named(changeable: Path) -> None:
    shutil.rmtree(changeable / "vae")
    message = refusal(changeable)
    assert "'vae'" in message
    assert str(changeable) in message


def test_a_whole_pipeline_is_no_vae(base_model: Path) -> None:
    message = refusal(base_model, pretrained_vae_model_name_or_path=str(base_model))
    assert str(base_model) in message
    assert "config.json" in message


def test_stable_diffusion_xl_without_its_second_text_encoder_is_refused(changeable: Path) -> None:
    config = dict(UNet2DConditionModel.load_config(changeable / "unet"))
    config |= {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    shutil.rmtree(changeable / "unet")
    UNet2DConditionModel.from_config(config).save_pretrained(changeable / "unet")
    message = refusal(changeable)
    assert "'text_encoder_2'" in message
    assert str(changeable) in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_out_channels": (32, 96)}, "block_out_channels"),
        ({"layers_per_block": 2}, "layers_per_block"),
        ({"cross_attention_dim": 48}, "cross_attention_dim"),
        ({"conditioning_channels": 1}, "conditioning_channels"),
        (
            {
                "block_out_channels": (32, 64, 64),
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            },
            "block_out_channels",
        ),
    ],
)
def test_a_controlnet_of_another_architecture_is_refused(
    base_model: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    tiny_controlnet(**changes).save_pretrained(tmp_path)
    message = refusal(base_model, controlnet_model_name_or_path=str(tmp_path))
    assert named in message
    assert str(base_model) in message


def test_a_vae_of_other_latents_is_refused(base_model: Path, tmp_path: Path) -> None:
    config = dict(AutoencoderKL.load_config(base_model / "vae")) | {"latent_channels": 16}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path)
    message = refusal(base_model, pretrained_vae_model_name_or_path=str(tmp_path))
    assert "are 4 and 16" in message


def test_an_architecture_that_diffusers_does_not_know_is_refused(changeable: Path) -> None:
    set_in(changeable / "unet" / "config.json", down_block_types=["NoSuchBlock", "DownBlock2D"])
    message = refusal(changeable)
    assert str(changeable / "unet") in message
    assert "NoSuchBlock" in message


def test_a_configuration_that_is_no_json_is_named(changeable: Path) -> None:
    (changeable / "unet" / "config.json").write_text("{")
    assert str(changeable / "unet") in refusal(changeable)
