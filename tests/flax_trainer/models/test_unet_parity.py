"""The UNet against diffusers' torch class: configuration, names and shapes, outputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_trainer.models.layers.compute import Compute
from flax_trainer.models.layers.resnet import Downsample2D, Upsample2D
from flax_trainer.models.layers.transformer import dot_product_attention
from flax_trainer.models.params import cast, split, torch_shape
from flax_trainer.models.unet import FlaxUNet2DConditionModel
from shared.models.configs.unet import UNet2DConditionConfig
from tests.flax_trainer.models.unet_reference import (
    FULL_SIZE,
    TINY_SD1,
    TINY_SD2,
    TINY_SDXL,
    TorchModel,
    added_conditions,
    bhwc,
    flax_copy,
    json_config,
    make_inputs,
    relative_difference,
    to_torch,
    torch_unet,
)


def run_torch(model: TorchModel, inputs: dict[str, np.ndarray]) -> np.ndarray:
    x = to_torch(inputs)
    with torch.no_grad():
        output = model(x["sample"], x["timesteps"], x["text"], added_cond_kwargs=added_conditions(x))
    return bhwc(output.sample)


def run_flax(definition: Any, params: dict[str, jax.Array], inputs: dict[str, Any]) -> jax.Array:
    @jax.jit
    def apply(params: dict[str, jax.Array], x: dict[str, jax.Array]) -> jax.Array:
        unet = definition.bind(params)
        return unet(x["sample"], x["timesteps"], x["text"], added_cond_kwargs=added_conditions(x))

    return apply(params, inputs)


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        pytest.param(TINY_SD1, 11, 19, id="sd1-odd"),
        pytest.param(TINY_SD2, 12, 20, id="sd2"),
        pytest.param(TINY_SDXL, 9, 10, id="sdxl-odd"),
        pytest.param(
            TINY_SD2
            | {
                "layers_per_block": [1, 2],
                "cross_attention_dim": [24, 24],
                "mid_block_type": "UNetMidBlock2D",
                "mid_block_scale_factor": 1.5,
                "only_cross_attention": [True, False],
                "center_input_sample": True,
                "downsample_padding": 0,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "norm_eps": 1e-3,
            },
            11,
            8,
            id="unusual",
        ),
    ],
)
def test_output_agrees_with_diffusers(config: dict[str, Any], height: int, width: int) -> None:
    model = torch_unet(config)
    inputs = make_inputs(config | {"cross_attention_dim": 24}, height, width)
    output = run_flax(*flax_copy(model), inputs)
    assert output.dtype == jnp.float32
    assert relative_difference(output, run_torch(model, inputs)) < 1e-5


def test_bfloat16_computes_in_bfloat16_and_stays_close() -> None:
    model = torch_unet(TINY_SD2)
    inputs = make_inputs(TINY_SD2, 8, 8)
    definition, params = flax_copy(model)
    halved = inputs | {"sample": jnp.asarray(inputs["sample"], jnp.bfloat16)}
    output = run_flax(definition, cast(params, jnp.bfloat16), halved)
    assert output.dtype == jnp.bfloat16
    assert relative_difference(output.astype(jnp.float32), run_torch(model, inputs)) < 0.1


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_parameters_have_diffusers_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        reference = UNet2DConditionModel.from_config(FULL_SIZE[name])
    definition, abstract = split(FlaxUNet2DConditionModel.abstract(json_config(reference)))
    shapes = {name: torch_shape(value.shape, definition.layouts[name]) for name, value in abstract.items()}
    assert shapes == {name: tuple(value.shape) for name, value in reference.state_dict().items()}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_config_survives_the_way_through_diffusers(name: str) -> None:
    config = UNet2DConditionConfig.from_dict(FULL_SIZE[name])
    with torch.device("meta"):
        reference = UNet2DConditionModel.from_config(config.to_dict())
        original = UNet2DConditionModel.from_config(FULL_SIZE[name])
    assert UNet2DConditionConfig.from_dict(json_config(reference)) == config
    assert {k: v for k, v in reference.config.items() if k[0] != "_"} == {
        k: v for k, v in original.config.items() if k[0] != "_"
    }


def test_saved_folder_loads_in_diffusers_and_back(tmp_path: Any) -> None:
    definition, params = flax_copy(torch_unet(TINY_SDXL))
    definition.bind(params).save_pretrained(tmp_path)
    reference = UNet2DConditionModel.from_pretrained(tmp_path)
    _, expected = flax_copy(reference)
    _, returned = split(FlaxUNet2DConditionModel.from_pretrained(tmp_path))
    for name, value in params.items():
        np.testing.assert_array_equal(value, expected[name])
        np.testing.assert_array_equal(value, returned[name])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_embed_type", "timestep"),
        ("encoder_hid_dim", 1024),
        ("time_cond_proj_dim", 256),
        ("dual_cross_attention", True),
        ("conv_in_kernel", 1),
        ("resnet_time_scale_shift", "scale_shift"),
        ("num_class_embeds", 1000),
        ("dropout", 0.1),
        ("time_embedding_type", "fourier"),
        ("addition_embed_type", "text"),
        ("addition_embed_type", "text_time"),
        ("num_attention_heads", 8),
        ("act_fn", "gelu"),
        ("norm_num_groups", None),
        ("norm_num_groups", 5),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]),
        ("down_block_types", ["DownBlock2D"]),
        ("up_block_types", ["UpBlock2D"]),
        ("attention_head_dim", [4, 4]),
        ("attention_head_dim", 3),
        ("transformer_layers_per_block", [[1, 1], [1, 1], [1, 1]]),
        ("from_a_later_release", 7),
        ("from_a_later_release", True),
        ("from_a_later_release", 0),
    ],
)
def test_unsupported_configuration_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="is not supported") as error:
        UNet2DConditionConfig.from_dict(TINY_SD1 | {field: value})
    assert field in str(error.value)


@pytest.mark.parametrize("value", [None, False])
def test_unknown_fields_without_effect_and_metadata_are_read_over(value: Any) -> None:
    config = TINY_SD1 | {"from_a_later_release": value, "_name_or_path": "x", "_class_name": "UNet2DConditionModel"}
    assert UNet2DConditionConfig.from_dict(config) == UNet2DConditionConfig.from_dict(TINY_SD1)


@pytest.mark.parametrize("conditions", [{}, {"text_embeds": np.zeros((2, 20), np.float32)}])
def test_missing_sdxl_conditions_are_named(conditions: dict[str, Any]) -> None:
    config = UNet2DConditionConfig.from_dict(TINY_SDXL)
    x = {name: jnp.asarray(value) for name, value in make_inputs(TINY_SDXL, 8, 8).items()}

    def run() -> jax.Array:
        return FlaxUNet2DConditionModel(config)(x["sample"], x["timesteps"], x["text"], added_cond_kwargs=conditions)

    with pytest.raises(ValueError, match="time_ids"):
        jax.eval_shape(run)


def test_residuals_come_in_full_sets() -> None:
    definition, params = flax_copy(torch_unet(TINY_SD2))
    inputs = make_inputs(TINY_SD2, 4, 4)

    def run(**residuals: Any) -> jax.ShapeDtypeStruct:
        args = (inputs["sample"], jnp.asarray(inputs["timesteps"]), inputs["text"])
        return jax.eval_shape(lambda: definition.bind(params)(*args, **residuals))

    with pytest.raises(ValueError, match="Only one of"):
        run(mid_block_additional_residual=jnp.zeros((2, 2, 2, 32)))
    with pytest.raises(ValueError, match="has 1 arrays and this UNet has 4"):
        run(
            down_block_additional_residuals=[jnp.zeros((2, 4, 4, 16))],
            mid_block_additional_residual=jnp.zeros((2, 2, 2, 32)),
        )


@settings(max_examples=12, deadline=None)
@given(small=st.integers(1, 40), extra=st.sampled_from([-1, 0, 1]))
def test_enlargement_is_torch_nearest(small: int, extra: int) -> None:
    size = max(1, 2 * small + extra)
    x = np.arange(small, dtype=np.float32).reshape(1, small, 1, 1)
    layer = Upsample2D(1, Compute())
    layer.conv.weight[...] = layer.conv.weight[...].at[1, 1].set(1.0)
    expected = torch.nn.functional.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), (size, 2), mode="nearest")
    np.testing.assert_array_equal(layer(jnp.asarray(x), size, 2), bhwc(expected))


@settings(max_examples=10, deadline=None)
@given(height=st.integers(2, 15), padding=st.sampled_from([0, 1]))
def test_skip_connections_fit_after_enlargement(height: int, padding: int) -> None:
    """Whatever the size, what the downsampler made can be enlarged to what it was made from."""
    x = jnp.ones((1, height, 4, 1))
    small = Downsample2D(1, padding, Compute())(x)
    assert Upsample2D(1, Compute())(small, height, 4).shape == x.shape
    assert small.shape[1] == (height // 2 if padding == 0 else -(-height // 2))


def test_attention_logits_are_float32_under_bfloat16() -> None:
    """What `upcast_attention` asks for: only the probabilities and the result are rounded."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(6 * rng.standard_normal((1, 16, 2, 40)), jnp.bfloat16) for _ in range(3))
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(40)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bnqk,bknd->bqnd", weights / weights.sum(-1, keepdims=True), v)
    # Logits reach about 100 here; rounded to bfloat16 they would be off by up to 0.25, and weights by a quarter.
    assert relative_difference(dot_product_attention(query, key, value).astype(jnp.float32), expected) < 0.01
    gradient = jax.grad(lambda q: dot_product_attention(q, key, value).astype(jnp.float32).sum())(query)
    assert gradient.dtype == jnp.bfloat16
