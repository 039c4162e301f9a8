"""Whatever is wrong with a model's folder, either backend reads it as ever or refuses it in a sentence, and soon."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from flax_trainer.base_models import load_base_models as load_flax_models
from flax_trainer.models import FlaxAutoencoderKL, FlaxCLIPTextModel, FlaxControlNetModel, FlaxUNet2DConditionModel
from shared.config import TrainConfig
from shared.data.tokenization import tokenizer_function
from shared.diffusion.samplers import SAMPLERS, sampler_plan
from shared.diffusion.schedule import NoiseSchedule
from shared.models.configs import AutoencoderKLConfig, CLIPTextConfig, ControlNetConfig, UNet2DConditionConfig
from shared.models.source import ModelSource
from shared.models.tokenizer_files import check_tokenizer_fits, read_tokenizer
from shared.models.weight_files import DIFFUSERS, stored_tensors
from shared.user_errors import UserError
from tests.shared.models import hostile_models as hostile
from torch_trainer.base_models import load_base_models as load_torch_models
from torch_trainer.base_models import load_model, load_unet

UNET, VAE, TEXT = "unet", "vae", "text_encoder"
WEIGHTS = {
    UNET: "diffusion_pytorch_model.safetensors",
    VAE: "diffusion_pytorch_model.safetensors",
    TEXT: "model.safetensors",
}
FLAX: dict[str, Any] = {UNET: FlaxUNet2DConditionModel, VAE: FlaxAutoencoderKL, TEXT: FlaxCLIPTextModel}
TORCH: dict[str, Any] = {
    UNET: (UNet2DConditionModel, UNet2DConditionConfig),
    VAE: (AutoencoderKL, AutoencoderKLConfig),
    TEXT: (CLIPTextModel, CLIPTextConfig),
}
_SECONDS = 20  # a tiny model is read in a tenth of one


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A reader that waits for ever fails its test."""

    def end(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(base_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_model, tmp_path / "model"))


def outcome(read: Callable[[], object]) -> str:
    """ "read", or the sentence of the refusal; anything else that a reader raises goes through."""
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        read()
    except ValueError as error:
        if not isinstance(error, UserError):
            raise
        message = str(error)
        assert message.isprintable(), message
        assert len(message) < 3000, message
        assert "\x1b" not in message
        return message
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read"


def outcomes(path: Path, edits: Iterable[tuple[str, hostile.Edit]], read: Callable[[], object]) -> dict[str, str]:
    """Of every edit of one file, which is honest again after each, as is its folder."""
    folder, original = path.parent, path.read_bytes()
    present = set(folder.iterdir())
    found, failures = {}, []
    for name, edit in edits:
        edit(path)
        try:
            found[name] = outcome(read)
        except Exception as error:  # all of them are of interest
            failures.append(f"{name}: {type(error).__name__}: {error}"[:500])
        for extra in set(folder.iterdir()) - present:
            extra.unlink()
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(original)
    assert not failures, "\n".join(failures)
    assert outcome(read) == "read"
    return found


def read_in_flax(model: Path, part: str) -> Any:
    return FLAX[part].load_params(ModelSource(model, part))


def read_in_torch(model: Path, part: str) -> Any:
    model_class, config_class = TORCH[part]
    return load_model(model_class, config_class, ModelSource(model, part))


BACKENDS = {"flax": read_in_flax, "torch": read_in_torch}
both_backends = pytest.mark.parametrize("read", BACKENDS.values(), ids=BACKENDS)
every_part = pytest.mark.parametrize("part", [UNET, VAE, TEXT])


# --- config.json -----------------------------------------------------------------------------------------------------


@every_part
def test_every_key_of_a_config_to_every_other_value(model: Path, part: str) -> None:
    path = model / part / "config.json"
    found = outcomes(path, hostile.key_edits(path), lambda: FLAX[part].load_config(ModelSource(model, part)))
    refused = [name for name, result in found.items() if result != "read"]
    assert len(refused) > 100
    assert all(str(path) in found[name] for name in refused)


@both_backends
@every_part
def test_a_config_that_is_something_else(model: Path, part: str, read: Callable[[Path, str], Any]) -> None:
    path = model / part / "config.json"
    edits = {
        name: hostile.write(content) for name, content in hostile.OTHER_DOCUMENTS.items()
    } | hostile.OTHER_DOCUMENT_FILES
    found = outcomes(path, edits.items(), lambda: read(model, part))
    assert [name for name, result in found.items() if result == "read"] == []


@both_backends
@pytest.mark.parametrize(
    ("part", "changes"),
    [
        (UNET, {"layers_per_block": 10**9}),
        (UNET, {"layers_per_block": 60, "transformer_layers_per_block": 60}),
        (UNET, {"transformer_layers_per_block": 10**9}),
        pytest.param(
            UNET, {"down_block_types": 1000 * ["DownBlock2D"], "block_out_channels": 1000 * [32]}, id="blocks"
        ),
        (UNET, {"attention_head_dim": 0}),
        (UNET, {"norm_num_groups": 0}),
        (VAE, {"layers_per_block": 10**9}),
        (VAE, {"block_out_channels": 16 * [16], "layers_per_block": 60}),
        (VAE, {"norm_num_groups": 0}),
        (TEXT, {"num_hidden_layers": 10**9}),
        (TEXT, {"num_attention_heads": 0}),
        (TEXT, {"vocab_size": 10**12}),
    ],
    ids=str,
)
def test_sizes_that_no_model_has(
    model: Path, part: str, changes: dict[str, Any], read: Callable[[Path, str], Any]
) -> None:
    path = model / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    result = outcome(lambda: read(model, part))
    assert str(path) in result
    assert next(iter(changes)) in result or "layers" in result


@both_backends
def test_a_config_that_is_the_name_of_another_folder_is_not_followed(
    model: Path, base_model: Path, read: Callable[[Path, str], Any]
) -> None:
    (model / UNET / "config.json").write_text(f'"{base_model / UNET}"')
    assert "holds something else than expected" in outcome(lambda: read(model, UNET))


@both_backends
@every_part
def test_a_file_of_the_users_own_in_a_configs_place_is_not_quoted(
    model: Path, tmp_path: Path, part: str, read: Callable[[Path, str], Any]
) -> None:
    private = tmp_path / "credentials.json"
    private.write_text('{"text": "hf_secret", "tokens": ["hf_secret"]}')
    (model / part / "config.json").unlink()
    (model / part / "config.json").symlink_to(private)
    assert "hf_secret" not in outcome(lambda: read(model, part))


# --- weights ---------------------------------------------------------------------------------------------------------


@both_backends
@every_part
def test_weights_that_are_something_else(model: Path, part: str, read: Callable[[Path, str], Any]) -> None:
    path = model / part / WEIGHTS[part]
    edits = hostile.OTHER_FILES | hostile.SAFETENSORS
    found = outcomes(path, edits.items(), lambda: read(model, part))
    assert [name for name, result in found.items() if result == "read"] == []
    assert all(str(path.parent) in result for result in found.values())


@both_backends
def test_unusual_numbers_are_numbers(model: Path, read: Callable[[Path, str], Any]) -> None:
    found = outcomes(model / VAE / WEIGHTS[VAE], hostile.HARMLESS_SAFETENSORS.items(), lambda: read(model, VAE))
    assert set(found.values()) == {"read"}


@both_backends
@pytest.mark.parametrize("part", [UNET, TEXT])
def test_pickles_that_are_something_else(
    model: Path, tmp_path: Path, part: str, read: Callable[[Path, str], Any]
) -> None:
    executed = tmp_path / "executed"
    found = outcomes(model / part / WEIGHTS[part], hostile.pickle_edits(executed).items(), lambda: read(model, part))
    assert not executed.exists()
    assert [name for name, result in found.items() if result == "read"] == []
    assert "could run code" in found["code"]


def test_what_is_pickled_honestly_is_read_alike(model: Path) -> None:
    safetensors, _ = read_in_torch(model, VAE)
    hostile.pickled(lambda tensors: tensors)(model / VAE / WEIGHTS[VAE])
    from_torch, _ = read_in_torch(model, VAE)
    for name, value in safetensors.state_dict().items():
        assert torch.equal(value, from_torch.state_dict()[name])


def test_an_index_that_is_something_else(model: Path) -> None:
    path = model / VAE / WEIGHTS[VAE]
    found = outcomes(path, hostile.index_edits(), lambda: list(stored_tensors(path.parent, DIFFUSERS, None)))
    assert [name for name, result in found.items() if result == "read"] == []


# --- tokenizers ------------------------------------------------------------------------------------------------------


def read_tokenizer_of(model: Path) -> None:
    tokenizer = read_tokenizer(ModelSource(model, "tokenizer"))
    check_tokenizer_fits(tokenizer, str(model), FlaxCLIPTextModel.load_config(ModelSource(model, TEXT)))
    assert tokenizer_function(tokenizer)(["a photo", "\u00e9\U0001f642\0"]).max() < 514


def test_every_key_of_a_tokenizers_settings_to_every_other_value(model: Path) -> None:
    path = model / "tokenizer" / "tokenizer_config.json"
    found = outcomes(path, hostile.key_edits(path), lambda: read_tokenizer_of(model))
    for name in (
        "zero",
        "minus one",
        "half",
        "number as text",
        "null",
        "true",
        "a billion",
        "beyond 64 bits",
        "object",
    ):
        assert "model_max_length" in found[f"model_max_length is {name}"]


def test_settings_that_name_files_and_code_are_passed_over(model: Path, tmp_path: Path) -> None:
    path = model / "tokenizer" / "tokenizer_config.json"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    settings = json.loads(path.read_text())
    named = [str(pipe), str(pipe)]
    path.write_text(
        json.dumps(
            settings
            | {"init_inputs": named, "fast_tokenizer_files": named, "vocab": named[0], "vocab_file": named[0]}
            | {"auto_map": {"AutoTokenizer": [f"{pipe}--code.Tokenizer", None]}, "chat_template": "{{ 1 / 0 }}"}
        )
    )
    assert outcome(lambda: read_tokenizer_of(model)) == "read"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.json", "merges.txt"])
def test_files_of_a_tokenizer_that_are_something_else(model: Path, name: str) -> None:
    path = model / "tokenizer" / name
    edits = {
        name: hostile.write(content) for name, content in hostile.OTHER_DOCUMENTS.items()
    } | hostile.OTHER_DOCUMENT_FILES
    found = outcomes(path, edits.items(), lambda: read_tokenizer_of(model))
    if name != "merges.txt":  # any text without pairs is a list of no merges
        assert [name for name, result in found.items() if result == "read"] == []


def test_vocabularies_and_merges_that_make_no_tokenizer(model: Path) -> None:
    vocabulary, merges = model / "tokenizer" / "vocab.json", model / "tokenizer" / "merges.txt"
    found = outcomes(vocabulary, hostile.vocabulary_edits(vocabulary).items(), lambda: read_tokenizer_of(model))
    assert "token ids up to 1000000000" in found["id of a billion"]
    # The library gives a special token that is missing the next free id.
    assert [name for name, result in found.items() if result == "read"] == ["no end", "no start"]
    outcomes(merges, hostile.merges_edits().items(), lambda: read_tokenizer_of(model))


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json", "tokenizer.json"])
def test_further_files_of_a_tokenizer_that_are_something_else(model: Path, name: str) -> None:
    path = model / "tokenizer" / name
    for content in [*hostile.OTHER_DOCUMENTS.values(), *hostile.ADDED_TOKENS.values()]:
        path.write_bytes(content)
        outcome(lambda: read_tokenizer_of(model))
    path.unlink()
    os.mkfifo(path)
    assert "a named pipe" in outcome(lambda: read_tokenizer_of(model))


def test_a_tokenizer_of_more_than_the_text_encoder_knows(model: Path) -> None:
    tokenizer = read_tokenizer(ModelSource(model, "tokenizer"))
    for changes, says in (
        ({"vocab_size": 513}, "token ids up to 513"),
        ({"vocab_size": 514, "max_position_embeddings": 76}, "model_max_length 77"),
    ):
        with pytest.raises(ValueError, match=says):
            check_tokenizer_fits(tokenizer, "the/model", CLIPTextConfig.from_dict(changes))
    check_tokenizer_fits(tokenizer, "the/model", CLIPTextConfig(vocab_size=514))


# --- schedules -------------------------------------------------------------------------------------------------------


def read_schedule(model: Path) -> None:
    schedule = NoiseSchedule.from_pretrained(model)
    assert np.isfinite(schedule.alphas_cumprod).all()
    for name in SAMPLERS:
        sampler_plan(name, schedule, 3)


def test_schedulers_that_are_something_else(model: Path) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    edits = {
        name: hostile.write(content) for name, content in hostile.OTHER_DOCUMENTS.items()
    } | hostile.OTHER_DOCUMENT_FILES
    found = outcomes(path, edits.items(), lambda: read_schedule(model))
    harmless = ["empty object", "key of escapes"]
    assert [name for name, result in found.items() if result == "read"] == ["document: object", *harmless]
    found = outcomes(path, hostile.key_edits(path), lambda: read_schedule(model))
    assert "num_train_timesteps" in found["num_train_timesteps is a billion"]
    assert "num_train_timesteps" in found["num_train_timesteps is number as text"]


@pytest.mark.parametrize(
    "betas", [[0.0, 0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0, 0.0], [0.999999] * 5, [float("nan")] * 5]
)
@pytest.mark.parametrize("rescaled", [False, True])
def test_trained_betas_that_are_no_use(betas: list[float], rescaled: bool) -> None:
    def read() -> None:
        config = {"trained_betas": betas, "num_train_timesteps": 5, "rescale_betas_zero_snr": rescaled}
        schedule = NoiseSchedule.from_config(config | {"timestep_spacing": "trailing"})
        for name in SAMPLERS:
            sampler_plan(name, schedule, 5)

    outcome(read)


def test_the_infinity_that_diffusers_writes_is_read(model: Path) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("{", '{"lambda_min_clipped": -Infinity,', 1))
    assert NoiseSchedule.from_pretrained(model).num_train_timesteps == 1000


# --- names and whole models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "\0",
        "a\0b/c",
        "../nowhere",
        5000 * "x",
        "owner/" + 300 * "x",
        "a\x1b[2J\nerror: forged",
        "half \ud83d",
        "https://user:hunter2secret@example.org/model?token=hunter2secret",
        "owner/name?token=hunter2secret",
        "a/b/c/d",
        "~nobody",
    ],
    ids=lambda name: repr(name)[:30],
)
def test_names_of_no_model(name: str) -> None:
    config = TrainConfig(pretrained_model_name_or_path=name)
    for read in (
        lambda: FlaxAutoencoderKL.load_params(ModelSource(name, VAE)),
        lambda: FlaxControlNetModel.load_config(ModelSource(name)),
        lambda: load_unet(config),
        lambda: read_tokenizer(ModelSource(name, "tokenizer")),
        lambda: NoiseSchedule.from_pretrained(name),
    ):
        message = outcome(read)
        assert message != "read"
        if "://" in name:
            assert "hunter2" not in message


@pytest.mark.parametrize("backend", ["flax", "torch"])
@pytest.mark.parametrize(
    ("part", "changes"),
    [
        (TEXT, {"hidden_size": 16, "num_attention_heads": 2}),
        (VAE, {"in_channels": 1}),
        (VAE, {"block_out_channels": [8, 16], "down_block_types": None, "up_block_types": None}),
        (UNET, {"out_channels": 8}),
        (UNET, {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}),
    ],
    ids=str,
)
def test_parts_that_are_whole_and_do_not_fit_the_others(
    model: Path, part: str, changes: dict[str, Any], backend: str
) -> None:
    config = json.loads((model / part / "config.json").read_text()) | changes
    if changes.get("addition_embed_type"):
        config["projection_class_embeddings_input_dim"] = 64
    config = {name: value for name, value in config.items() if value is not None or name not in changes}
    shutil.rmtree(model / part)
    FLAX[part].from_config(config).save_pretrained(model / part)
    settings = TrainConfig(pretrained_model_name_or_path=str(model))
    schedule = NoiseSchedule.from_pretrained(model)
    message = outcome(
        (lambda: load_flax_models(settings, schedule))
        if backend == "flax"
        else (lambda: load_torch_models(settings, torch.float32))
    )
    assert "do not belong together" in message or "no subfolder 'text_encoder_2'" in message


@pytest.mark.parametrize(
    ("read", "nulls"),
    [
        # Stable Diffusion XL's unet/config.json, as published
        (UNet2DConditionConfig, ("upcast_attention", "num_attention_heads", "time_cond_proj_dim", "class_embed_type")),
        (ControlNetConfig, ("upcast_attention", "num_attention_heads", "class_embed_type")),
        (AutoencoderKLConfig, ("force_upcast", "sample_size", "latents_mean")),
    ],
)
def test_what_published_files_leave_open_is_read(read: Any, nulls: tuple[str, ...]) -> None:
    assert not read.from_dict(dict.fromkeys(nulls)).to_dict().get(nulls[0])
