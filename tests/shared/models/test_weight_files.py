"""Folders and repositories as diffusers and transformers write them: what is found, read, refused and written."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from flax_trainer.models.clip import FlaxCLIPTextModel
from flax_trainer.models.controlnet import FlaxControlNetModel
from flax_trainer.models.params import split
from flax_trainer.models.pretrained import PretrainedModel
from flax_trainer.models.unet import FlaxUNet2DConditionModel
from flax_trainer.models.vae import FlaxAutoencoderKL
from shared.models import source
from shared.models.weight_files import DIFFUSERS, read_weights, write_weights

VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
CONTROLNET = {key: value for key, value in UNET.items() if key != "sample_size"}
CLIP = {
    "vocab_size": 500,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 48,
    "eos_token_id": 49,
}


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(**VAE)


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], type[PretrainedModel]]] = {
    "vae": (make_vae, FlaxAutoencoderKL),
    "unet": (
        lambda: UNet2DConditionModel(**UNET, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
        FlaxUNet2DConditionModel,
    ),
    "controlnet": (
        lambda: ControlNetModel(**CONTROLNET, conditioning_embedding_out_channels=(8, 16)),
        FlaxControlNetModel,
    ),
    "text_encoder": (lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)), FlaxCLIPTextModel),
}
SAVES = {
    "safetensors": {},
    "variant": {"variant": "fp16"},
    "sharded": {"max_shard_size": "20KB"},
    "sharded_variant": {"max_shard_size": "20KB", "variant": "fp16"},
}


def as_torch(model: PretrainedModel, folder: Path) -> dict[str, np.ndarray]:
    """A model's values under PyTorch's names and in its layout."""
    model.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same_values(ours: dict[str, np.ndarray], theirs: torch.nn.Module) -> None:
    expected = {name: value.numpy() for name, value in theirs.state_dict().items()}
    if "embeddings.token_embedding.weight" in expected:
        expected = {f"text_model.{name}": value for name, value in expected.items()}
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, expected[name])


# --- both ways, all models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
@pytest.mark.parametrize(("make", "flax_class"), MODELS.values(), ids=MODELS.keys())
def test_what_pytorch_saves_is_read_bit_for_bit(tmp_path, make, flax_class, save):
    theirs = make()
    theirs.save_pretrained(tmp_path / "theirs", **save)
    if "max_shard_size" in save:
        assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = flax_class.from_pretrained(tmp_path / "theirs", variant=save.get("variant"))
    assert_same_values(as_torch(ours, tmp_path / "ours"), theirs)


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
@pytest.mark.parametrize(("make", "flax_class"), MODELS.values(), ids=MODELS.keys())
def test_what_we_save_pytorch_reads_bit_for_bit(tmp_path, make, flax_class, save):
    example = make()
    example.save_pretrained(tmp_path / "config")
    ours = flax_class.from_config(json.loads((tmp_path / "config" / "config.json").read_text()), seed=7)
    ours.save_pretrained(tmp_path / "ours", **save)
    if "max_shard_size" in save:
        assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    theirs = type(example).from_pretrained(tmp_path / "ours", variant=save.get("variant"))
    assert_same_values(as_torch(ours, tmp_path / "reference"), theirs)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["single", "sharded"])
def test_bin_files_of_diffusers_are_read(tmp_path, shards):
    theirs = make_vae()
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=False, **shards)
    assert list((tmp_path / "theirs").glob("*.bin"))
    ours = FlaxAutoencoderKL.from_pretrained(tmp_path / "theirs")
    assert_same_values(as_torch(ours, tmp_path / "ours"), theirs)


@pytest.mark.parametrize("legacy_format", [False, True], ids=["zip", "before_torch_1_6"])
def test_bin_files_of_transformers_are_read(tmp_path, legacy_format):
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))
    theirs.config.save_pretrained(tmp_path)
    state = {f"text_model.{name}": value for name, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy_format)
    ours = FlaxCLIPTextModel.from_pretrained(tmp_path)
    assert_same_values(as_torch(ours, tmp_path / "ours"), theirs)


def test_bin_files_without_torch_are_refused_with_the_way_out(tmp_path, monkeypatch):
    make_vae().save_pretrained(tmp_path, safe_serialization=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs torch.*convert the model to safetensors"):
        FlaxAutoencoderKL.from_pretrained(tmp_path)


def test_pickles_that_run_code_are_not_run(tmp_path):
    class Payload:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "config.json").write_text(json.dumps(VAE))
    torch.save({"encoder.conv_in.weight": Payload()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="something else than tensors"):
        FlaxAutoencoderKL.from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file_format", [True, False], ids=["safetensors", "bin"])
def test_half_precision_files_are_read_in_the_dtype_asked_for(tmp_path, stored, file_format):
    theirs = make_vae().to(stored)
    theirs.save_pretrained(tmp_path, safe_serialization=file_format)
    expected = theirs.state_dict()["encoder.conv_in.bias"].float().numpy()
    for dtype in (jnp.float32, jnp.bfloat16):
        params = split(FlaxAutoencoderKL.from_pretrained(tmp_path, dtype=dtype))[1]
        assert {value.dtype for value in params.values()} == {jnp.dtype(dtype)}
        np.testing.assert_array_equal(
            params["encoder.conv_in.bias"].astype(jnp.float32), jnp.asarray(expected, dtype).astype(jnp.float32)
        )


def test_bfloat16_values_are_saved_as_they_are(tmp_path):
    source = make_vae().to(torch.bfloat16)
    source.save_pretrained(tmp_path / "theirs")
    FlaxAutoencoderKL.from_pretrained(tmp_path / "theirs", dtype=jnp.bfloat16).save_pretrained(tmp_path / "ours")
    theirs = AutoencoderKL.from_pretrained(tmp_path / "ours", torch_dtype=torch.bfloat16)
    for name, value in source.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


# --- which file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.safetensors.fp16.index.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ],
)
def test_every_published_style_of_index_is_found(tmp_path, index):
    theirs = make_vae()
    theirs.save_pretrained(tmp_path / "theirs", variant="fp16", max_shard_size="20KB")
    (written,) = (tmp_path / "theirs").glob("*index*.json")
    written.rename(written.with_name(index))
    ours = FlaxAutoencoderKL.from_pretrained(tmp_path / "theirs", variant="fp16")
    assert_same_values(as_torch(ours, tmp_path / "ours"), theirs)


def test_a_missing_variant_names_what_is_there(tmp_path):
    make_vae().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"variant 'fp16'.*there are diffusion_pytorch_model\.safetensors\."):
        FlaxAutoencoderKL.from_pretrained(tmp_path, variant="fp16")
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(ValueError, match=r"No weights in .*diffusion_pytorch_model\.non_ema\.safetensors"):
        FlaxAutoencoderKL.from_pretrained(tmp_path)


def test_a_folder_of_flax_weights_says_how_to_convert(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VAE))
    (tmp_path / "diffusion_flax_model.msgpack").touch()
    with pytest.raises(ValueError, match="msgpack weights are not read"):
        FlaxAutoencoderKL.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    make_vae().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        FlaxAutoencoderKL.from_pretrained(tmp_path)


def test_missing_unexpected_and_misshapen_parameters_are_all_named_at_once(tmp_path):
    make_vae().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.bias"]
    tensors["decoder.extra"] = np.zeros(3, np.float32)
    tensors["encoder.conv_in.bias"] = np.zeros(5, np.float32)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"1 missing: decoder\.conv_in\.bias;") as caught:
        FlaxAutoencoderKL.from_pretrained(tmp_path)
    assert "1 unexpected: decoder.extra" in str(caught.value)
    assert "1 of another shape: encoder.conv_in.bias is [5], the configuration makes it [8]" in str(caught.value)


def test_damaged_files_are_named(tmp_path):
    make_vae().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        FlaxAutoencoderKL.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        FlaxAutoencoderKL.from_pretrained(tmp_path)


def test_another_kind_of_model_is_refused_and_flax_folders_of_old_are_not(tmp_path):
    make_vae().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is that of AutoencoderKL: expected ControlNetModel"):
        FlaxControlNetModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "FlaxAutoencoderKL"}))
    assert FlaxAutoencoderKL.from_pretrained(tmp_path).config.layers_per_block == 1


def test_wrong_places_are_explained(tmp_path):
    make_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"no subfolder 'text_encoder'\. Subfolders there: vae"):
        FlaxAutoencoderKL.from_pretrained(tmp_path, subfolder="text_encoder")
    with pytest.raises(ValueError, match=r"no config\.json.*subfolder=, one of vae"):
        FlaxAutoencoderKL.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not a local folder, nor a repository's name"):
        FlaxAutoencoderKL.from_pretrained(tmp_path / "missing")
    assert FlaxAutoencoderKL.from_pretrained(str(tmp_path), subfolder="vae").config.norm_num_groups == 4


# --- the Hub --------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached_repository(cache: Path) -> Path:
    """huggingface_hub's cache after downloading the main branch of owner/name."""
    root = cache / "models--owner--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    return root / "snapshots" / COMMIT


def test_a_cached_repository_is_read_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    theirs = make_vae()
    theirs.save_pretrained(cached_repository(tmp_path / "cache") / "vae", max_shard_size="20KB")
    ours = FlaxAutoencoderKL.from_pretrained("owner/name", subfolder="vae", cache_dir=tmp_path / "cache")
    assert_same_values(as_torch(ours, tmp_path / "ours"), theirs)


def test_offline_without_the_files_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'owner/name' is not a local folder, .* cannot be reached"):
        FlaxAutoencoderKL.from_pretrained("owner/name", cache_dir=tmp_path)
    make_vae().save_pretrained(cached_repository(tmp_path) / "vae")
    with pytest.raises(ValueError, match=r"not all weights of owner/name/vae .*variant 'fp16'"):
        FlaxAutoencoderKL.from_pretrained("owner/name", subfolder="vae", variant="fp16", cache_dir=tmp_path)


class FakeHub:
    """Stands for the Hub behind `hf_hub_download` and `list_repo_files`, and notes what was downloaded."""

    def __init__(self, files: Path, cache: Path):
        self.files = files
        self.snapshot = cache / "snapshots" / COMMIT
        self.downloads: list[tuple[str, str | None]] = []

    def download(self, repo: str, name: str, *, subfolder: str | None, revision: str | None, **_: object) -> str:
        path = "/".join(filter(None, (subfolder, name)))
        if not (self.files / path).is_file():
            raise EntryNotFoundError(path)
        self.downloads.append((path, revision))
        target = self.snapshot / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.files / path, target)
        return str(target)

    def list_repo_files(self, repo: str, revision: str) -> list[str]:
        return [str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file()]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub", tmp_path / "cache")
    make_vae().save_pretrained(fake.files / "vae")
    make_vae().save_pretrained(fake.files / "vae", safe_serialization=False)
    make_vae().save_pretrained(fake.files / "vae", variant="fp16", max_shard_size="20KB")
    monkeypatch.setattr(source, "hf_hub_download", fake.download)
    monkeypatch.setattr(source, "HfApi", lambda: fake)
    return fake


def test_only_the_needed_files_are_downloaded_and_of_one_commit(hub):
    FlaxAutoencoderKL.from_pretrained("owner/name", subfolder="vae", revision="v1")
    assert hub.downloads == [("vae/config.json", "v1"), ("vae/diffusion_pytorch_model.safetensors", COMMIT)]


def test_shards_of_a_variant_are_downloaded(hub):
    FlaxAutoencoderKL.from_pretrained("owner/name", subfolder="vae", variant="fp16")
    names = {name for name, _ in hub.downloads}
    assert "vae/diffusion_pytorch_model.safetensors.index.fp16.json" in names
    assert len(names) > 3
    assert all("fp16" in name for name in names - {"vae/config.json"})


def test_what_a_repository_lacks_is_explained(hub):
    with pytest.raises(ValueError, match=r"variant 'bf16' in owner/name/vae.*there are .*\.bin"):
        FlaxAutoencoderKL.from_pretrained("owner/name", subfolder="vae", variant="bf16")
    with pytest.raises(ValueError, match=r"owner/name/unet .*no config\.json.*subfolder="):
        FlaxAutoencoderKL.from_pretrained("owner/name", subfolder="unet")


# --- writing --------------------------------------------------------------------------------------------------------


def test_saving_again_leaves_one_model_and_no_scraps(tmp_path):
    model = FlaxAutoencoderKL.from_config(VAE)
    model.save_pretrained(tmp_path, variant="fp16")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
    ]


def test_weights_can_be_read_by_whoever_can_read_the_configuration(tmp_path):
    FlaxAutoencoderKL.from_config(VAE).save_pretrained(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    FlaxAutoencoderKL.from_config(VAE).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fill_the_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr("shared.models.weight_files.save_file", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        FlaxAutoencoderKL.from_config(VAE, seed=1).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_flat_parameters_are_saved_and_loaded_without_a_module(tmp_path):
    definition, params = split(FlaxAutoencoderKL.from_config(VAE))
    config = FlaxAutoencoderKL.config_class.from_dict(VAE)
    FlaxAutoencoderKL.save_params(tmp_path, config, params, definition.layouts)
    read_config, read = FlaxAutoencoderKL.load_params(source.ModelSource(tmp_path))
    assert read_config == config
    assert all(isinstance(value, np.ndarray) for value in read.values())
    for name, value in read.items():
        np.testing.assert_array_equal(value, params[name])


def test_unreadable_shard_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_shard_size is '5 pages'"):
        FlaxAutoencoderKL.from_config(VAE).save_pretrained(tmp_path, max_shard_size="5 pages")


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    limit=st.none() | st.integers(1, 200),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    variant=st.none() | st.just("fp16"),
)
def test_what_is_written_is_read_back_whatever_the_shards(tmp_path_factory, sizes, limit, dtype, variant):
    folder = tmp_path_factory.mktemp("weights")
    arrays = {f"layer.{index}": np.arange(size).astype(dtype) for index, size in enumerate(sizes)}
    write_weights(folder, arrays, DIFFUSERS, variant, limit)
    read = dict(read_weights(folder, DIFFUSERS, variant))
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
