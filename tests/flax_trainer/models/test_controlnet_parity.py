"""The ControlNet, alone and through the UNet, against diffusers' torch classes: outputs, gradients, its start."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from flax_trainer.models.controlnet import FlaxControlNetModel, controlnet_params_from_unet
from flax_trainer.models.params import from_torch_layout, split, torch_shape
from flax_trainer.models.unet import FlaxUNet2DConditionModel
from shared.models.configs.unet import ControlNetConfig, UNet2DConditionConfig
from tests.flax_trainer.models.unet_reference import (
    CONDITIONING_WIDTHS,
    FULL_SIZE,
    TINY,
    TINY_SD1,
    TINY_SD2,
    TINY_SDXL,
    TorchModel,
    added_conditions,
    bhwc,
    flax_copy,
    json_config,
    make_inputs,
    params_of,
    relative_difference,
    to_torch,
    torch_controlnet,
    torch_unet,
)

SCALE = 0.7
TWO_RESOLUTIONS = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


def run_torch_controlnet(controlnet: TorchModel, x: dict[str, torch.Tensor]) -> Any:
    return controlnet(
        x["sample"], x["timesteps"], x["text"], x["condition"], SCALE, added_cond_kwargs=added_conditions(x)
    )


def run_torch_pair(unet: TorchModel, controlnet: TorchModel, x: dict[str, torch.Tensor]) -> torch.Tensor:
    residuals = run_torch_controlnet(controlnet, x)
    return unet(
        x["sample"],
        x["timesteps"],
        x["text"],
        added_cond_kwargs=added_conditions(x),
        down_block_additional_residuals=residuals.down_block_res_samples,
        mid_block_additional_residual=residuals.mid_block_res_sample,
    ).sample


def run_flax_controlnet(controlnet: FlaxControlNetModel, x: dict[str, jax.Array]) -> Any:
    return controlnet(
        x["sample"], x["timesteps"], x["text"], x["condition"], SCALE, added_cond_kwargs=added_conditions(x)
    )


def run_flax_unet(unet: FlaxUNet2DConditionModel, x: dict[str, jax.Array], down: Any, mid: Any) -> jax.Array:
    return unet(
        x["sample"],
        x["timesteps"],
        x["text"],
        added_cond_kwargs=added_conditions(x),
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    )


@pytest.mark.parametrize(
    ("config", "height", "width", "for_tpu"),
    [
        pytest.param(TINY_SD1 | TWO_RESOLUTIONS, 11, 19, False, id="sd1-odd"),
        pytest.param(TINY_SD1 | TWO_RESOLUTIONS, 11, 19, True, id="sd1-odd-tpu"),
        pytest.param(TINY_SD2, 12, 20, False, id="sd2"),
        pytest.param(TINY_SDXL, 8, 6, False, id="sdxl"),
    ],
)
def test_chained_output_and_all_gradients_agree_with_diffusers(
    config: dict[str, Any], height: int, width: int, for_tpu: bool
) -> None:
    unet, controlnet = torch_unet(config), torch_controlnet(torch_unet(config))
    inputs = make_inputs(config, height, width)
    target = np.random.default_rng(1).standard_normal(inputs["sample"].shape, np.float32)
    unet_definition, unet_params = flax_copy(unet, for_tpu=for_tpu)
    definition, params = flax_copy(controlnet, for_tpu=for_tpu)

    @jax.jit
    def flax_step(params: Any, unet_params: Any, x: dict[str, jax.Array]) -> Any:
        def loss(params: Any) -> Any:
            residuals = run_flax_controlnet(definition.bind(params), x)
            output = run_flax_unet(unet_definition.bind(unet_params), x, *residuals)
            return jnp.square(output - target).mean(), (residuals, output)

        return jax.grad(loss, has_aux=True)(params)

    gradients, ((down, mid), output) = flax_step(params, unet_params, inputs)

    x = to_torch(inputs)
    residuals = run_torch_controlnet(controlnet, x)
    expected = run_torch_pair(unet, controlnet, x)
    (expected - to_torch({"target": target})["target"]).square().mean().backward()

    wanted_residuals = (*residuals.down_block_res_samples, residuals.mid_block_res_sample)
    for given, wanted in zip((*down, mid), wanted_residuals, strict=True):
        assert relative_difference(given, bhwc(wanted)) < 1e-5
    assert relative_difference(output, bhwc(expected)) < 1e-5

    wanted_gradients = {name: parameter.grad for name, parameter in controlnet.named_parameters()}
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        wanted = from_torch_layout(wanted_gradients[name].numpy(), definition.layouts[name])
        assert np.linalg.norm(wanted) > 0, name
        assert np.linalg.norm(gradient - wanted) < 1e-4 * np.linalg.norm(wanted), name


@pytest.mark.parametrize(
    "overrides", [{"controlnet_conditioning_channel_order": "bgr"}, {"global_pool_conditions": True}]
)
def test_less_common_options_agree_with_diffusers(overrides: dict[str, Any]) -> None:
    controlnet = torch_controlnet(torch_unet(TINY_SD2), **overrides)
    inputs = make_inputs(TINY_SD2, 6, 4)
    definition, params = flax_copy(controlnet)
    down, mid = jax.jit(lambda params, x: run_flax_controlnet(definition.bind(params), x))(params, inputs)
    with torch.no_grad():
        wanted = run_torch_controlnet(controlnet, to_torch(inputs))
    wanted_residuals = (*wanted.down_block_res_samples, wanted.mid_block_res_sample)
    for given, expected in zip((*down, mid), wanted_residuals, strict=True):
        assert relative_difference(given, bhwc(expected)) < 1e-5


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_parameters_have_diffusers_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        reference = ControlNetModel.from_unet(
            UNet2DConditionModel.from_config(FULL_SIZE[name]), load_weights_from_unet=False
        )
    definition, abstract = split(FlaxControlNetModel.abstract(json_config(reference)))
    shapes = {name: torch_shape(value.shape, definition.layouts[name]) for name, value in abstract.items()}
    assert shapes == {name: tuple(value.shape) for name, value in reference.state_dict().items()}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_config_made_from_the_unet_is_diffusers(name: str) -> None:
    config = ControlNetConfig.from_unet_config(UNet2DConditionConfig.from_dict(FULL_SIZE[name]))
    with torch.device("meta"):
        reference = ControlNetModel.from_unet(
            UNet2DConditionModel.from_config(FULL_SIZE[name]), load_weights_from_unet=False
        )
        returned = ControlNetModel.from_config(config.to_dict())
    assert ControlNetConfig.from_dict(json_config(reference)) == config
    assert ControlNetConfig.from_dict(json_config(returned)) == config


@pytest.mark.parametrize("name", TINY)
def test_from_unet_copies_what_diffusers_copies_and_zeroes_the_rest(name: str) -> None:
    unet = torch_unet(TINY[name])
    reference = ControlNetModel.from_unet(
        unet, conditioning_channels=4, conditioning_embedding_out_channels=CONDITIONING_WIDTHS
    )
    unet_definition, unet_params = flax_copy(unet)
    controlnet = FlaxControlNetModel.from_unet(
        unet_definition.bind(unet_params),
        conditioning_channels=4,
        conditioning_embedding_out_channels=CONDITIONING_WIDTHS,
        seed=3,
    )
    definition, params = split(controlnet)
    expected = params_of(reference, definition.layouts)
    assert params.keys() == expected.keys()
    for key, value in params.items():
        assert value.shape == expected[key].shape
        assert value.dtype == jnp.float32
        if key.startswith("controlnet_cond_embedding") and expected[key].any():
            # torch draws other numbers from the same distribution: uniform within 1/sqrt(fan in).
            fan_in = np.prod(params[key.rpartition(".")[0] + ".weight"].shape[:-1])
            assert 0.5 < float(jnp.abs(value).max()) * np.sqrt(fan_in) <= 1, key
        else:
            np.testing.assert_array_equal(value, expected[key], err_msg=key)


def test_start_depends_on_the_seed_and_owns_its_memory() -> None:
    _, unet_params = flax_copy(torch_unet(TINY_SD2))
    config = ControlNetConfig.from_unet_config(
        UNet2DConditionConfig.from_dict(TINY_SD2), conditioning_embedding_out_channels=CONDITIONING_WIDTHS
    )
    definition, abstract = split(FlaxControlNetModel.abstract(config))
    first, again, other = (
        controlnet_params_from_unet(unet_params, abstract, definition.layouts, seed) for seed in (0, 0, 1)
    )
    differing = {name for name in first if not np.array_equal(first[name], other[name])}
    fresh = {name for name in first if name.startswith("controlnet_cond_embedding") and "conv_out" not in name}
    assert differing == fresh
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    first["conv_in.weight"].delete()  # what donating the ControlNet's parameters does
    assert np.isfinite(unet_params["conv_in.weight"]).all()


def test_half_precision_unet_gives_a_float32_controlnet() -> None:
    _, unet_params = flax_copy(torch_unet(TINY_SD2))
    config = ControlNetConfig.from_unet_config(UNet2DConditionConfig.from_dict(TINY_SD2))
    definition, abstract = split(FlaxControlNetModel.abstract(config))
    halved = {name: np.asarray(value, np.float16) for name, value in unet_params.items()}
    params = controlnet_params_from_unet(halved, abstract, definition.layouts, 0)
    assert {value.dtype for value in params.values()} == {jnp.dtype("float32")}


def test_fresh_controlnet_leaves_the_unet_as_it_is() -> None:
    reference = torch_unet(TINY_SD2)
    unet_definition, unet_params = flax_copy(reference)
    controlnet = FlaxControlNetModel.from_unet(
        unet_definition.bind(unet_params), conditioning_embedding_out_channels=CONDITIONING_WIDTHS
    )
    definition, params = split(controlnet)
    inputs = make_inputs(TINY_SD2, 6, 4)

    @jax.jit
    def run(params: Any, unet_params: Any, x: dict[str, jax.Array]) -> Any:
        residuals = run_flax_controlnet(definition.bind(params), x)
        return residuals, run_flax_unet(unet_definition.bind(unet_params), x, *residuals)

    residuals, output = run(params, unet_params, inputs)
    assert not any(residual.any() for residual in jax.tree.leaves(residuals))
    x = to_torch(inputs)
    with torch.no_grad():
        alone = reference(x["sample"], x["timesteps"], x["text"]).sample
    assert relative_difference(output, bhwc(alone)) < 1e-5


def test_another_unet_is_refused_by_the_parameter_that_differs() -> None:
    config = ControlNetConfig.from_unet_config(UNet2DConditionConfig.from_dict(TINY_SD2))
    definition, abstract = split(FlaxControlNetModel.abstract(config))
    _, other = split(FlaxUNet2DConditionModel.abstract(TINY_SDXL))
    with pytest.raises(ValueError, match=r"down_blocks\.0\.attentions\..* the UNet has nothing"):
        controlnet_params_from_unet(other, abstract, definition.layouts, 0)


def test_saved_folder_loads_in_diffusers(tmp_path: Any) -> None:
    definition, params = flax_copy(torch_controlnet(torch_unet(TINY_SDXL)))
    definition.bind(params).save_pretrained(tmp_path)
    returned = params_of(ControlNetModel.from_pretrained(tmp_path), definition.layouts)
    for name, value in params.items():
        np.testing.assert_array_equal(value, returned[name])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("controlnet_conditioning_channel_order", "gbr"),
        ("layers_per_block", [2, 2]),
        ("cross_attention_dim", [24, 24]),
        ("conditioning_embedding_out_channels", []),
        ("encoder_hid_dim_type", "text_proj"),
    ],
)
def test_unsupported_configuration_names_field_and_value(field: str, value: Any) -> None:
    config = json_config(torch_controlnet(torch_unet(TINY_SD2)))
    with pytest.raises(ValueError, match=f"{field}=.*is not supported"):
        ControlNetConfig.from_dict(config | {field: value})


def test_uneven_unet_cannot_become_a_controlnet() -> None:
    unet = UNet2DConditionConfig.from_dict(TINY_SD2 | {"layers_per_block": [1, 2]})
    with pytest.raises(ValueError, match="layers_per_block"):
        ControlNetConfig.from_unet_config(unet)


def test_heads_may_be_given_under_their_own_name() -> None:
    config = json_config(torch_controlnet(torch_unet(TINY_SD2)))
    explicit = ControlNetConfig.from_dict(config | {"num_attention_heads": [2, 4], "attention_head_dim": 1})
    assert explicit.heads_per_block == ControlNetConfig.from_dict(config).heads_per_block == (2, 4)


@pytest.mark.parametrize("shape", [(2, 40, 32, 3), (2, 48, 32, 1)])
def test_condition_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    config = ControlNetConfig.from_unet_config(UNet2DConditionConfig.from_dict(TINY_SD2))

    def run() -> Any:
        controlnet = FlaxControlNetModel(config)
        return controlnet(jnp.ones((2, 6, 4, 4)), jnp.zeros(2), jnp.ones((2, 7, 24)), jnp.ones(shape))

    with pytest.raises(ValueError, match=r"need \(48, 32, 3\)"):
        jax.eval_shape(run)
