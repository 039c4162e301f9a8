"""The text encoders against transformers' PyTorch ones."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flax_trainer.models.clip import (
    CLIPTextConfig,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    end_positions,
)
from flax_trainer.models.params import cast, split, torch_shape

BOS, EOS = 96, 97
TINY = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 11,
    "projection_dim": 12,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": 1,
}
CASES = {
    "vit_l": ("CLIPTextModel", FlaxCLIPTextModel, {"hidden_act": "quick_gelu"}),
    "openclip_h": ("CLIPTextModel", FlaxCLIPTextModel, {"hidden_act": "gelu"}),
    "openclip_bigg": ("CLIPTextModelWithProjection", FlaxCLIPTextModelWithProjection, {"hidden_act": "gelu"}),
    "legacy_eos": ("CLIPTextModel", FlaxCLIPTextModel, {"eos_token_id": 2}),
}


def torch_encoder(class_name: str, **overrides: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(transformers.CLIPTextConfig(**(TINY | overrides))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def token_ids(length: int = 11) -> np.ndarray:
    """Texts that end early, padded once with the end token and once with another, one without padding."""
    ids = np.random.default_rng(0).integers(3, 90, (3, length)).astype(np.int32)
    ids[:, 0] = BOS
    ids[0, 4:] = EOS
    ids[1, 6:] = [EOS] + [1] * (length - 7)
    ids[2, -1] = EOS
    ids[2, 3] = EOS + 1  # a learned token beyond the vocabulary's end: here the legacy rule differs
    return ids


def relative_error(ours: object, theirs: torch.Tensor) -> float:
    expected = theirs.detach().numpy()
    assert ours.shape == expected.shape
    return float(np.linalg.norm(np.asarray(ours) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("class_name", "flax_class", "overrides"), CASES.values(), ids=CASES.keys())
def test_outputs_agree_with_transformers(tmp_path, class_name, flax_class, overrides):
    theirs = torch_encoder(class_name, **overrides)
    theirs.save_pretrained(tmp_path)
    ours = flax_class.from_pretrained(tmp_path)
    ids = token_ids()

    last, pooled = ours(jnp.asarray(ids))
    penultimate, same_pooled = ours(jnp.asarray(ids), penultimate=True)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long(), output_hidden_states=True)
    expected_pooled = expected.text_embeds if "Projection" in class_name else expected.pooler_output
    assert relative_error(last, expected.last_hidden_state) < 1e-5
    assert relative_error(penultimate, expected.hidden_states[-2]) < 1e-5
    assert relative_error(pooled, expected_pooled) < 1e-5
    np.testing.assert_array_equal(pooled, same_pooled)


def test_a_token_does_not_see_those_after_it():
    model = FlaxCLIPTextModel.from_config(TINY)
    ids = token_ids()
    changed = ids.copy()
    changed[:, 5:] = 7
    before, after = (model(jnp.asarray(x))[0] for x in (ids, changed))
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert not np.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


def test_shorter_texts_are_taken_and_longer_ones_refused():
    model = FlaxCLIPTextModel.from_config(TINY)
    assert model(jnp.asarray(token_ids(length=8)))[0].shape == (3, 8, 16)
    with pytest.raises(ValueError, match=r"12 tokens .* at most 11"):
        model(jnp.asarray(token_ids(length=12)))


def test_half_precision_computes_in_half():
    definition, params = split(FlaxCLIPTextModel.from_config(TINY))
    ids = jnp.asarray(token_ids())
    hidden, pooled = definition.bind(cast(params, jnp.bfloat16))(ids)
    assert hidden.dtype == pooled.dtype == jnp.bfloat16
    np.testing.assert_allclose(hidden.astype(jnp.float32), definition.bind(params)(ids)[0], atol=0.1)


def test_the_first_end_token_counts():
    ids = jnp.asarray([[5, 99, 7, 99], [5, 6, 99, 120]])
    assert end_positions(ids, 99).tolist() == [1, 2]
    assert end_positions(ids, 2).tolist() == [1, 3]


SIZES = {
    "vit_l": ("CLIPTextModel", FlaxCLIPTextModel, (768, 12, 12, 3072, 768, "quick_gelu")),
    "openclip_h": ("CLIPTextModel", FlaxCLIPTextModel, (1024, 23, 16, 4096, 512, "gelu")),
    "openclip_bigg": (
        "CLIPTextModelWithProjection",
        FlaxCLIPTextModelWithProjection,
        (1280, 32, 20, 5120, 1280, "gelu"),
    ),
}


@pytest.mark.parametrize(("class_name", "flax_class", "size"), SIZES.values(), ids=SIZES.keys())
def test_full_size_names_and_shapes_are_those_of_published_checkpoints(class_name, flax_class, size):
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "projection_dim",
        "hidden_act",
    )
    config = dict(zip(names, size, strict=True))
    with torch.device("meta"):
        theirs = getattr(transformers, class_name)(transformers.CLIPTextConfig(**config)).state_dict()
    published = {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tuple(value.shape)
        for name, value in theirs.items()
    }
    definition, params = split(flax_class.abstract(config))
    assert {name: torch_shape(value.shape, definition.layouts[name]) for name, value in params.items()} == published


@pytest.mark.parametrize(
    ("class_name", "flax_class"),
    [
        ("CLIPTextModel", FlaxCLIPTextModel),
        ("CLIPTextModelWithProjection", FlaxCLIPTextModelWithProjection),
    ],
)
def test_what_we_write_is_bit_for_bit_what_transformers_reads(tmp_path, class_name, flax_class):
    ours = flax_class.from_config(TINY | {"hidden_act": "gelu"}, seed=1)
    ours.save_pretrained(tmp_path / "ours")
    theirs, info = getattr(transformers, class_name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert theirs.config.hidden_act == "gelu"
    theirs.save_pretrained(tmp_path / "theirs")
    back = flax_class.from_pretrained(tmp_path / "theirs")
    assert back.config == ours.config
    _, expected = split(ours)
    for name, value in split(back)[1].items():
        np.testing.assert_array_equal(value, expected[name])


def test_files_and_configurations_of_transformers_4_are_read(tmp_path):
    """Names with `text_model.`, a table of positions, the old wrong end token, generation settings, torch_dtype."""
    theirs = torch_encoder("CLIPTextModel", eos_token_id=2)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(11)[None]
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None)
    config |= {"torch_dtype": "float32", "transformers_version": "4.21.0", "num_beams": 1, "top_k": 50, "dropout": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(config))

    ids = token_ids()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long())
    hidden, pooled = FlaxCLIPTextModel.from_pretrained(tmp_path)(jnp.asarray(ids))
    assert relative_error(hidden, expected.last_hidden_state) < 1e-5
    assert relative_error(pooled, expected.pooler_output) < 1e-5


def test_published_names_are_written(tmp_path):
    FlaxCLIPTextModelWithProjection.from_config(TINY).save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written["text_model.encoder.layers.0.self_attn.q_proj.weight"].shape == (16, 16)
    assert written["text_projection.weight"].shape == (12, 16)
    assert all(name.startswith(("text_model.", "text_projection.")) for name in written)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'.*quick_gelu or gelu"),
        ({"num_attention_heads": 3}, "num_attention_heads 3"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"model_type": "t5"}, "model_type='t5'.*text_encoder"),
    ],
)
def test_unsupported_configurations_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        CLIPTextConfig.from_dict(TINY | overrides)
