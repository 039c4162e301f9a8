"""Models that cannot work together are refused before anything is computed."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.models.compatibility import check_models_fit

BASE = "some/model"


def configurations(**changes: Any) -> dict[str, SimpleNamespace]:
    """Of models that fit, but for changes named `model__attribute`."""
    settings: dict[str, dict[str, Any]] = {
        "unet": {
            "addition_embed_type": None,
            "cross_attention_dim": 768,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640),
            "layers_per_block": 2,
        },
        "text_encoder": {"hidden_size": 768},
        "vae": {"latent_channels": 4, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8, 8, 8)},
        "controlnet": {
            "addition_embed_type": None,
            "in_channels": 4,
            "conditioning_embedding_out_channels": (16, 32, 96, 256),
            "cross_attention_dim": 768,
            "block_out_channels": (320, 640),
            "layers_per_block": 2,
            "conditioning_channels": 3,
        },
    }
    for name, value in changes.items():
        model, _, attribute = name.partition("__")
        assert attribute in settings[model]
        settings[model][attribute] = value
    return {model: SimpleNamespace(**values) for model, values in settings.items()}


def refusal(**changes: Any) -> str:
    with pytest.raises(ValueError, match=BASE) as refused:
        check_models_fit(BASE, **configurations(**changes))
    return str(refused.value)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 2048))
def test_models_that_fit_are_taken_lists_or_tuples(channels: list[int], layers: int, width: int) -> None:
    """JSON has lists, diffusers' and our configurations tuples."""
    check_models_fit(
        BASE,
        **configurations(
            unet__block_out_channels=channels,
            controlnet__block_out_channels=tuple(channels),
            unet__layers_per_block=layers,
            controlnet__layers_per_block=layers,
            unet__cross_attention_dim=width,
            controlnet__cross_attention_dim=width,
            text_encoder__hidden_size=width,
        ),
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"text_encoder__hidden_size": 1024}, ["text encoder", "768", "1024"]),
        ({"vae__latent_channels": 16}, ["VAE", "4", "16"]),
        ({"unet__in_channels": 9}, ["VAE", "9", "4"]),
        ({"controlnet__cross_attention_dim": 1024}, ["ControlNet", "cross_attention_dim", "768", "1024"]),
        ({"controlnet__block_out_channels": [320, 640, 1280]}, ["block_out_channels", "(320, 640)", "1280]"]),
        ({"controlnet__layers_per_block": [2, 2]}, ["layers_per_block", "[2, 2]"]),
        ({"controlnet__conditioning_channels": 1}, ["--conditioning_channels is 3", "conditions of 1 channels"]),
        ({"controlnet__in_channels": 9}, ["ControlNet", "4 and 9"]),
        ({"controlnet__addition_embed_type": "text_time"}, ["addition_embed_type", "None and text_time"]),
        ({"unet__out_channels": 8}, ["out_channels", "4 and 8"]),
        ({"vae__in_channels": 1}, ["VAE", "3 and 1"]),
        ({"vae__out_channels": 4}, ["VAE", "3 and 4"]),
        ({"vae__block_out_channels": (8, 8, 8)}, ["conditioning_embedding_out_channels", "4 and 8"]),
    ],
)
def test_what_does_not_fit_is_named_with_both_values(changes: dict[str, Any], parts: list[str]) -> None:
    message = refusal(**changes)
    for part in parts:
        assert part in message


def xl_configurations(**changes: Any) -> dict[str, SimpleNamespace]:
    """Those of stable-diffusion-xl-base-1.0, but for `projection_dim` and the like of its second text encoder."""
    given = configurations(unet__cross_attention_dim=2048, controlnet__cross_attention_dim=2048)
    for model in ("unet", "controlnet"):
        vars(given[model]).update(
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816
        )
    given["text_encoder_2"] = SimpleNamespace(**({"hidden_size": 1280, "projection_dim": 1280} | changes))
    return given


def test_stable_diffusion_xl_fits_with_both_its_text_encoders() -> None:
    check_models_fit(BASE, **xl_configurations())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": 1024}, ["both text encoders", "2048", "1792"]),
        ({"projection_dim": 1024}, ["projection_class_embeddings_input_dim", "2816", "2560"]),
    ],
)
def test_another_second_text_encoder_does_not_fit(changes: dict[str, int], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=BASE) as refused:
        check_models_fit(BASE, **xl_configurations(**changes))
    for part in parts:
        assert part in str(refused.value)
    assert "copy the whole model again" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"), [("addition_time_embed_dim", 128), ("projection_class_embeddings_input_dim", 2560)]
)
def test_a_controlnet_that_is_told_other_sizes_does_not_fit(name: str, value: int) -> None:
    """That of the refiner has another width of these."""
    given = xl_configurations()
    expected = getattr(given["unet"], name)
    setattr(given["controlnet"], name, value)
    with pytest.raises(ValueError, match=rf"\({name}\) of the UNet and the ControlNet are {expected} and {value}"):
        check_models_fit(BASE, **given)
