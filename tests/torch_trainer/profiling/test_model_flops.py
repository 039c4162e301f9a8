"""FLOPs counted in PyTorch against those of the Flax backend, of PyTorch's own counter, and of the published models."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from flax_trainer.base_models import load_base_models as load_flax_models
from flax_trainer.profiling.model_flops import model_flops_per_image as count_in_flax
from flax_trainer.random_model import ARCHITECTURES, write_random_model
from flax_trainer.training.step import Objective
from tests.torch_trainer.tiny_training import batch_of, configuration, schedule_of
from torch_trainer.base_models import load_base_models
from torch_trainer.profiling.model_flops import ModelShapes, flops_of, model_flops_per_image

TINY = ARCHITECTURES["tiny"]
# Linear projections, and heads that differ from block to block, as Stable Diffusion 2 has.
LIKE_SD2 = dataclasses.replace(TINY, unet=TINY.unet | {"use_linear_projection": True, "attention_head_dim": [2, 4]})


@pytest.fixture(scope="module")
def like_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("like-sd2")
    write_random_model(LIKE_SD2, folder)
    return folder


def counts(folder: Path, **flags: Any) -> tuple[float, float]:
    """In PyTorch and in Flax, for the same base model and flags."""
    config, batch = configuration(folder, **flags), batch_of(6, slices=2, xl=(folder / "text_encoder_2").exists())
    shapes = ModelShapes.of(load_base_models(config, torch.float32), batch, only_mid_control=config.only_mid_control)
    models, initial = load_flax_models(config, schedule_of(folder))
    objective = Objective.create(config, models)
    in_flax = count_in_flax(models.defs, objective, initial.trained, initial.frozen, batch)
    return model_flops_per_image(shapes), in_flax


@pytest.mark.parametrize(
    "flags", [{}, {"sd_unlocked": True}, {"only_mid_control": True}], ids=lambda flags: "".join(flags) or "plain"
)
def test_both_backends_count_the_same(base_model: Path, flags: dict[str, Any]) -> None:
    in_torch, in_flax = counts(base_model, **flags)
    assert in_torch == pytest.approx(in_flax, rel=1e-6)


def test_both_backends_count_the_same_for_models_like_stable_diffusion_2(like_sd2: Path) -> None:
    in_torch, in_flax = counts(like_sd2)
    assert in_torch == pytest.approx(in_flax, rel=1e-6)


def test_both_backends_count_the_same_for_stable_diffusion_xl(xl_model: Path) -> None:
    in_torch, in_flax = counts(xl_model, sd_unlocked=True)
    assert in_torch == pytest.approx(in_flax, rel=1e-6)


def test_what_is_trained_decides(base_model: Path) -> None:
    plain, unlocked, mid = (
        counts_in_torch(base_model, **flags) for flags in ({}, {"sd_unlocked": True}, {"only_mid_control": True})
    )
    assert mid < plain < unlocked


def counts_in_torch(folder: Path, **flags: Any) -> float:
    config = configuration(folder, **flags)
    models = load_base_models(config, torch.float32)
    return model_flops_per_image(ModelShapes.of(models, batch_of(1), only_mid_control=config.only_mid_control))


@pytest.mark.parametrize(
    ("name", "resolution", "tera"), [("sd15", 512, 2.265), ("sd21", 768, 6.263), ("sdxl", 1024, 20.016)]
)
def test_published_models_take_what_flax_counts(name: str, resolution: int, tera: float) -> None:
    """`tests/flax_trainer/profiling/test_model_flops.py` derives these figures by hand."""
    config, side = ARCHITECTURES[name].unet, resolution // 8
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    shapes = ModelShapes(
        controlnet=ControlNetModel,
        controlnet_config=controlnet.config,
        unet=UNet2DConditionModel,
        unet_config=unet.config,
        trained_in_unet=frozenset(),
        only_mid_control=False,
        latent_shape=(side, side, 4),
        condition_shape=(resolution, resolution, 3),
        text_shape=(77, config["cross_attention_dim"]),
        added_shapes={"text_embeds": (1280,), "time_ids": (6,)} if name == "sdxl" else {},
    )
    assert model_flops_per_image(shapes) / 1e12 == pytest.approx(tera, abs=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_products_agree_with_pytorchs_own_counter(stride: int) -> None:
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, stride=stride, padding=1),
        torch.nn.Flatten(2),
        torch.nn.Linear((8 // stride) ** 2, 5),
    )
    states = torch.randn(2, 4, 8, 8, requires_grad=True)

    def work() -> None:
        out = layers(states)
        torch.baddbmm(out, out @ out.transpose(1, 2), out).sum().backward()

    with FlopCounterMode(display=False) as theirs:
        work()
    assert flops_of(work) == theirs.get_total_flops()


def test_counting_leaves_no_weights_and_no_hooks_behind(base_model: Path) -> None:
    config = configuration(base_model)
    models = load_base_models(config, torch.float32)
    before = {name: param.clone() for name, param in models.controlnet.named_parameters()}
    model_flops_per_image(ModelShapes.of(models, batch_of(1), only_mid_control=False))
    assert not torch.nn.modules.module._has_any_global_hook()
    for name, param in models.controlnet.named_parameters():
        assert param.grad is None
        np.testing.assert_array_equal(param.detach(), before[name].detach())
