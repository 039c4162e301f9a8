"""The autoencoder against diffusers' PyTorch one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from flax_trainer.models.layers.compute import Compute
from flax_trainer.models.params import cast, split, torch_shape
from flax_trainer.models.vae import AutoencoderKLConfig, FlaxAutoencoderKL

TINY = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 32,
}
VARIATIONS = {
    "stable_diffusion": {},
    "two_layers": {"layers_per_block": 2},
    "no_quant_conv": {"use_quant_conv": False, "use_post_quant_conv": False},
    "no_attention": {"mid_block_add_attention": False},
}


def torch_vae(**overrides: object) -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(**(TINY | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases must matter too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def to_torch(array_bhwc: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array_bhwc.transpose(0, 3, 1, 2)))


def relative_error(ours_bhwc: jax.Array, theirs_bchw: torch.Tensor) -> float:
    theirs = theirs_bchw.detach().numpy().transpose(0, 2, 3, 1)
    assert ours_bhwc.shape == theirs.shape
    return float(np.linalg.norm(np.asarray(ours_bhwc) - theirs) / np.linalg.norm(theirs))


def encode(model: FlaxAutoencoderKL, pixels_bhwc: np.ndarray) -> tuple[jax.Array, jax.Array]:
    definition, params = split(model)  # compiled whole: a fraction of the time of compiling operation by operation
    return jax.jit(lambda params, pixels: definition.bind(params).encode(pixels))(params, pixels_bhwc)


def decode(model: FlaxAutoencoderKL, latents_bhwc: jax.Array) -> jax.Array:
    definition, params = split(model)
    return jax.jit(lambda params, latents: definition.bind(params).decode(latents))(params, latents_bhwc)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (2, 32, 24, 3)).astype(np.float32)


@pytest.mark.parametrize("overrides", VARIATIONS.values(), ids=VARIATIONS.keys())
def test_encode_and_decode_agree_with_diffusers(tmp_path, pixels, overrides):
    theirs = torch_vae(**overrides)
    theirs.save_pretrained(tmp_path)
    ours = FlaxAutoencoderKL.from_pretrained(tmp_path)

    mean, std = encode(ours, pixels)
    with torch.no_grad():
        distribution = theirs.encode(to_torch(pixels)).latent_dist
        decoded = theirs.decode(distribution.mean).sample
    assert mean.dtype == std.dtype == jnp.float32
    assert relative_error(mean, distribution.mean) < 1e-5
    assert relative_error(std, distribution.std) < 1e-5
    assert relative_error(decode(ours, mean), decoded) < 1e-5


@pytest.mark.parametrize(("height", "width"), [(33, 30), (27, 31)])
def test_odd_sizes_agree_with_diffusers(tmp_path, height, width):
    theirs = torch_vae()
    theirs.save_pretrained(tmp_path)
    ours = FlaxAutoencoderKL.from_pretrained(tmp_path)
    pixels = np.random.default_rng(2).uniform(-1, 1, (1, height, width, 3)).astype(np.float32)

    mean, _ = encode(ours, pixels)
    with torch.no_grad():
        expected = theirs.encode(to_torch(pixels)).latent_dist.mean
        decoded = theirs.decode(expected).sample
    assert mean.shape == (1, height // 4, width // 4, 4)
    assert relative_error(mean, expected) < 1e-5
    assert relative_error(decode(ours, mean), decoded) < 1e-5


@pytest.mark.parametrize(("images", "in_strips"), [(2, True), (8, False)])
def test_the_form_for_tpus_agrees_with_diffusers(tmp_path, images, in_strips):
    """Few images are cut into 8 strips, whose width the three resolutions halve twice."""
    theirs = torch_vae()
    theirs.save_pretrained(tmp_path)
    ours = FlaxAutoencoderKL.from_pretrained(tmp_path, compute=Compute(tpu_convolutions=True))
    pixels = np.random.default_rng(2).uniform(-1, 1, (images, 24, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.encode(to_torch(pixels)).latent_dist.mean
    assert relative_error(encode(ours, pixels)[0], expected) < 1e-5
    made = {
        variable.aval.shape for equation in jax.make_jaxpr(ours.encoder)(pixels).eqns for variable in equation.outvars
    }
    assert in_strips == ((images, 8, 24, 8, 8) in made)


def test_memory_efficient_attention_agrees_with_diffusers(tmp_path):
    """In blocks of queries, for 72×72 positions, in the encoder and the decoder."""
    theirs = torch_vae()
    theirs.save_pretrained(tmp_path)
    ours = FlaxAutoencoderKL.from_pretrained(tmp_path, compute=Compute(attention="blockwise"))
    pixels = np.random.default_rng(2).uniform(-1, 1, (1, 288, 288, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.encode(to_torch(pixels)).latent_dist.mean
    assert relative_error(encode(ours, pixels)[0], expected) < 1e-5
    assert "scan" in str(jax.make_jaxpr(ours.encode)(pixels))
    assert "scan" in str(jax.make_jaxpr(ours.decode)(expected.numpy().transpose(0, 2, 3, 1)))


def test_a_width_that_strips_do_not_divide_agrees_too(tmp_path):
    theirs = torch_vae()
    theirs.save_pretrained(tmp_path)
    ours = FlaxAutoencoderKL.from_pretrained(tmp_path, compute=Compute(tpu_convolutions=True))
    pixels = np.random.default_rng(2).uniform(-1, 1, (1, 33, 48, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.encode(to_torch(pixels)).latent_dist.mean
    assert relative_error(encode(ours, pixels)[0], expected) < 1e-5


def test_extreme_log_variances_are_clamped_as_in_diffusers(tmp_path, pixels):
    theirs = torch_vae()
    with torch.no_grad():
        theirs.quant_conv.bias[4:] = torch.tensor([-100.0, 100.0, -25.0, 15.0])
    theirs.save_pretrained(tmp_path)
    _, std = encode(FlaxAutoencoderKL.from_pretrained(tmp_path), pixels)
    with torch.no_grad():
        expected = theirs.encode(to_torch(pixels)).latent_dist.std.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(np.asarray(std), expected, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(std[..., 0]), np.exp(-15.0), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(std[..., 1]), np.exp(10.0), rtol=1e-5)


def test_half_precision_computes_in_half_and_keeps_statistics_in_float32(pixels):
    definition, params = split(FlaxAutoencoderKL.from_config({"block_out_channels": (8, 8), "norm_num_groups": 4}))
    reference = definition.bind(params)
    half = definition.bind(cast(params, jnp.bfloat16))
    mean, std = encode(half, pixels)
    image = decode(half, mean)
    assert (mean.dtype, std.dtype, image.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(mean, encode(reference, pixels)[0], atol=0.05)


def test_full_size_names_and_shapes_are_those_of_diffusers():
    config = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        theirs = AutoencoderKL(**config, **types).state_dict()
    model = FlaxAutoencoderKL.abstract(config)
    definition, params = split(model)
    ours = {name: torch_shape(value.shape, definition.layouts[name]) for name, value in params.items()}
    assert ours == {name: tuple(value.shape) for name, value in theirs.items()}
    assert model.scale_factor == 8


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_old_attention_names_are_read_and_new_ones_written(tmp_path, pixels, as_convolutions):
    theirs = torch_vae()
    theirs.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{old}.")
                if as_convolutions and tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]
        renamed[name] = tensor
    assert any(".query." in name for name in renamed)
    save_file(renamed, file, metadata={"format": "pt"})

    ours = FlaxAutoencoderKL.from_pretrained(tmp_path / "old")
    with torch.no_grad():
        expected = theirs.encode(to_torch(pixels)).latent_dist.mean
    assert relative_error(encode(ours, pixels)[0], expected) < 1e-5

    ours.save_pretrained(tmp_path / "new")
    written = load_file(tmp_path / "new" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == theirs.state_dict().keys()


def test_what_we_write_is_bit_for_bit_what_diffusers_reads(tmp_path):
    ours = FlaxAutoencoderKL.from_config(TINY | {"scaling_factor": 0.13025, "force_upcast": False}, seed=3)
    ours.save_pretrained(tmp_path / "ours")
    theirs, info = AutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert theirs.config.scaling_factor == 0.13025
    assert theirs.config.force_upcast is False
    assert tuple(theirs.config.block_out_channels) == (8, 16, 16)

    theirs.save_pretrained(tmp_path / "theirs")
    back = FlaxAutoencoderKL.from_pretrained(tmp_path / "theirs")
    assert back.config == ours.config
    _, expected = split(ours)
    _, params = split(back)
    assert params.keys() == expected.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"act_fn": "relu"}, "act_fn='relu'.*expected 'silu'"),
        ({"shift_factor": 0.1159}, "shift_factor=0.1159"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
        ({"temporal_layers": 2}, "temporal_layers=2"),
    ],
)
def test_unsupported_configurations_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        FlaxAutoencoderKL.abstract(TINY | overrides)


def test_configuration_survives_its_file_and_is_hashable():
    config = AutoencoderKLConfig.from_dict({"_class_name": "AutoencoderKL"} | TINY | {"sample_size": [64, 32]})
    assert AutoencoderKLConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(AutoencoderKLConfig.from_dict(config.to_dict()))
