"""A base model that no ControlNet can be trained on is refused for what its small files say of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flax_trainer.random_model import ARCHITECTURES
from shared.config import TrainConfig
from shared.models.base_model import check_base_model, zeros_for_empty_prompt
from shared.models.configs import ControlNetConfig, UNet2DConditionConfig
from shared.models.xl import is_xl, vae_in_float32
from shared.user_errors import UserError

Folder = Callable[..., Path]
XL = ARCHITECTURES["tiny_xl"]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Writes the small files of an architecture, but for those left out, with changes to its UNet."""

    def write(name: str = "tiny_xl", *without: str, **unet: Any) -> Path:
        parts = ARCHITECTURES[name]
        files: dict[str, Any] = {
            "unet/config.json": parts.unet | unet,
            "vae/config.json": parts.vae,
            "text_encoder/config.json": parts.text_encoder,
        }
        if parts.text_encoder_2 is not None:
            files["text_encoder_2/config.json"] = parts.text_encoder_2
            files["tokenizer_2/tokenizer_config.json"] = {}
        for path, content in files.items():
            if not path.startswith(without or "-"):
                (tmp_path / path).parent.mkdir(exist_ok=True)
                (tmp_path / path).write_text(json.dumps(content))
        return tmp_path

    return write


def refusal(model: Path, scheduler: dict[str, Any] | None = None, **flags: Any) -> str:
    with pytest.raises(UserError) as refused:
        check_base_model(TrainConfig(pretrained_model_name_or_path=str(model), **flags), scheduler or {})
    message = str(refused.value)
    assert "\n" not in message
    assert str(model) in message
    return message


@pytest.mark.parametrize("name", ["tiny", "tiny_xl"])
def test_base_models_are_taken(folder: Folder, name: str) -> None:
    config = TrainConfig(pretrained_model_name_or_path=str(folder(name)))
    assert is_xl(check_base_model(config, ARCHITECTURES[name].scheduler)) == (name == "tiny_xl")


@pytest.mark.parametrize(("part", "file"), [("text_encoder_2", "config.json"), ("tokenizer_2", "tokenizer_config")])
def test_xl_needs_both_of_its_text_encoders_and_tokenizers(folder: Folder, part: str, file: str) -> None:
    message = refusal(folder("tiny_xl", part))
    assert f"without {part}/{file}" in message
    assert "whole model" in message


def test_the_refiner_is_no_base_model(folder: Folder) -> None:
    message = refusal(folder(projection_class_embeddings_input_dim=48 + 5 * 8))
    assert "refiner" in message
    assert "stabilityai/stable-diffusion-xl-base-1.0" in message


@pytest.mark.parametrize("name", ["tiny", "tiny_xl"])
def test_an_inpainting_model_is_told_so(folder: Folder, name: str) -> None:
    assert "inpainting" in refusal(folder(name, in_channels=9))


TRAILING = {"timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("scheduler", "sign"),
    [
        ({"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING}, "timestep_spacing 'trailing'"),  # SDXL-Turbo
        ({"_class_name": "EulerDiscreteScheduler", **TRAILING}, "timestep_spacing 'trailing'"),  # SDXL-Lightning
        (
            {"_class_name": "EulerDiscreteScheduler", **TRAILING, "prediction_type": "sample"},  # its one-step model
            "timestep_spacing 'trailing'",
        ),
        ({"_class_name": "LCMScheduler"}, "_class_name 'LCMScheduler'"),
        ({"_class_name": "TCDScheduler", "timestep_spacing": "leading"}, "_class_name 'TCDScheduler'"),  # Hyper-SD
    ],
)
def test_a_distilled_xl_is_refused(folder: Folder, scheduler: dict[str, Any], sign: str) -> None:
    message = refusal(folder(), scheduler)
    assert "SDXL-Turbo, SDXL-Lightning or an LCM" in message
    assert f"scheduler_config.json has {'' if sign.startswith('_') else '_class_name '}" in message
    assert sign in message


@pytest.mark.parametrize(
    "scheduler",
    [
        {"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING, "prediction_type": "v_prediction"},
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "leading"},
        {"_class_name": "DDIMScheduler", **TRAILING},
    ],
)
def test_other_schedulers_are_no_sign_of_distillation(folder: Folder, scheduler: dict[str, Any]) -> None:
    check_base_model(TrainConfig(pretrained_model_name_or_path=str(folder())), scheduler)


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("text_encoder", {"hidden_size": 64}, "both text encoders (hidden_size) are 96 and 128"),
        ("text_encoder_2", {"hidden_size": 32}, "both text encoders (hidden_size) are 96 and 64"),
        ("text_encoder_2", {"projection_dim": 64}, "(projection_dim) are 96 and 112"),
        ("vae", {"latent_channels": 16}, "the VAE (latent_channels) are 4 and 16"),
    ],
)
def test_parts_of_another_width_do_not_fit_an_xl(
    folder: Folder, part: str, changes: dict[str, int], expected: str
) -> None:
    model = folder()
    file = model / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert expected in refusal(model)


def test_a_vae_of_another_width_does_not_replace_an_xls(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(XL.vae | {"latent_channels": 16}))
    message = refusal(folder(), pretrained_vae_model_name_or_path=str(tmp_path / "other"))
    assert "the VAE (latent_channels) are 4 and 16" in message


def test_one_tokenizer_does_not_replace_an_xls_two(folder: Folder, tmp_path: Path) -> None:
    model, other = folder(), tmp_path / "other"
    for place, lacking in (("", "tokenizer/"), ("tokenizer", "tokenizer_2/")):
        (other / place).mkdir(exist_ok=True)
        (other / place / "tokenizer_config.json").write_text("{}")
        with pytest.raises(UserError, match=rf"--tokenizer_name .*other is without {lacking}tokenizer_config"):
            check_base_model(
                TrainConfig(pretrained_model_name_or_path=str(model), tokenizer_name=str(other)), XL.scheduler
            )


def test_only_xl_is_told_of_crops(folder: Folder) -> None:
    assert "--crops_coords_top_left_w is 7" in refusal(folder("tiny"), crops_coords_top_left_w=7)
    assert "--time_ids_from_data is True" in refusal(folder("tiny"), time_ids_from_data=True)
    check_base_model(TrainConfig(pretrained_model_name_or_path=str(folder()), crops_coords_top_left_w=7), {})


@pytest.mark.parametrize(("base", "start"), [("tiny_xl", "tiny"), ("tiny", "tiny_xl")])
def test_a_controlnet_of_the_other_kind_is_no_start(folder: Folder, tmp_path: Path, base: str, start: str) -> None:
    controlnet = ControlNetConfig.from_unet_config(UNet2DConditionConfig.from_dict(ARCHITECTURES[start].unet))
    (tmp_path / "controlnet").mkdir()
    (tmp_path / "controlnet" / "config.json").write_text(json.dumps(controlnet.to_dict()))
    message = refusal(folder(base), controlnet_model_name_or_path=str(tmp_path / "controlnet"))
    kinds = {"tiny_xl": "Stable Diffusion XL", "tiny": "Stable Diffusion 1.x or 2.x"}
    assert f"is a ControlNet for {kinds[start]}: expected one for {kinds[base]}" in message


@pytest.mark.parametrize(("asked_for", "has"), [(3, 1), (1, 3), (3, 4)])
def test_a_controlnet_of_other_channels_is_no_start(folder: Folder, tmp_path: Path, asked_for: int, has: int) -> None:
    """Told by its configuration: there are no weights."""
    unet = UNet2DConditionConfig.from_dict(ARCHITECTURES["tiny"].unet)
    controlnet = ControlNetConfig.from_unet_config(unet, conditioning_channels=has)
    (tmp_path / "controlnet").mkdir()
    (tmp_path / "controlnet" / "config.json").write_text(json.dumps(controlnet.to_dict()))
    start = {"controlnet_model_name_or_path": str(tmp_path / "controlnet")}
    message = refusal(folder("tiny"), **start, conditioning_channels=(asked_for,))
    assert f"--conditioning_channels is {asked_for}, but the ControlNet takes conditions of {has} channels" in message
    if has in (1, 3):
        config = TrainConfig(pretrained_model_name_or_path=str(folder("tiny")), **start, conditioning_channels=(has,))
        check_base_model(config, {})


@pytest.mark.parametrize(
    ("index", "zeros"), [(None, True), ({}, True), ({"force_zeros_for_empty_prompt": False}, False)]
)
def test_the_pipelines_index_says_what_stands_for_no_prompt(
    tmp_path: Path, index: dict[str, Any] | None, zeros: bool
) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"} | index))
    assert zeros_for_empty_prompt(TrainConfig(pretrained_model_name_or_path=str(tmp_path))) is zeros


@pytest.mark.parametrize(
    ("name", "force_upcast", "expected"),
    [("sdxl", True, True), ("sdxl", False, False), ("sdxl", None, False), ("sd15", True, False)],
)
def test_only_xls_own_vae_stays_in_float32(name: str, force_upcast: bool | None, expected: bool) -> None:
    """Other models' files say nothing of it, and then the field is true."""
    unet = UNet2DConditionConfig.from_dict(ARCHITECTURES[name].unet)
    vae = type("Vae", (), {"force_upcast": force_upcast})
    assert vae_in_float32(unet, vae) is expected
