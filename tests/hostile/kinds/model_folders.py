"""Hostile models in diffusers' layout: the folder, and the command line that names it."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.hostile.case import Case
from tests.hostile.kinds import originals
from tests.hostile.mutations.addresses import hostile_address
from tests.hostile.mutations.binary import (
    malicious_pickle,
    malicious_torch_zip,
    mutated_bytes,
    mutated_safetensors,
    random_bytes,
)
from tests.hostile.mutations.places import copy_tree, displace, files_in, mutate_file, plant
from tests.hostile.mutations.values import hostile_text, mutated_json, pick, snippet, some
from tests.hostile.words import CHECKPOINT, model_words


@dataclass(frozen=True)
class Layout:
    """Of the honest models that cases mutate copies of.

    Attributes:
        model, controlnet: their places among the originals.
        files: how often each is chosen: most can be wrong about the configurations.
        configs: those that are JSON and read.
    """

    model: str
    controlnet: str
    files: dict[str, int]
    configs: Sequence[str]

    @property
    def choices(self) -> list[str]:
        return [name for name, weight in self.files.items() for _ in range(weight)]

    @property
    def weights(self) -> list[str]:
        return [name for name in self.files if name.endswith(".safetensors")]

    @property
    def parts(self) -> list[str]:
        return list(dict.fromkeys(name.partition("/")[0] for name in self.files if "/" in name))

    @property
    def tokenizers(self) -> list[str]:
        return [part for part in self.parts if part.startswith("tokenizer")]


_INDEX = "model_index.json"
_FILES = {
    "scheduler/scheduler_config.json": 5,
    "unet/config.json": 8,
    "vae/config.json": 6,
    "text_encoder/config.json": 8,
    "tokenizer/tokenizer_config.json": 5,
    "tokenizer/vocab.json": 4,
    "tokenizer/merges.txt": 3,
    "unet/diffusion_pytorch_model.safetensors": 3,
    "vae/diffusion_pytorch_model.safetensors": 3,
    "text_encoder/model.safetensors": 3,
    _INDEX: 1,
}
_XL_FILES = _FILES | {
    "text_encoder_2/config.json": 8,
    "tokenizer_2/tokenizer_config.json": 5,
    "tokenizer_2/vocab.json": 4,
    "tokenizer_2/merges.txt": 3,
    "text_encoder_2/model.safetensors": 3,
    _INDEX: 4,  # says what stands for no prompt
}


def _configs(files: Iterable[str]) -> list[str]:
    return [name for name in files if name.endswith("config.json")]


SD = Layout("model", f"torch_run/{CHECKPOINT}/controlnet", _FILES, _configs(_FILES))
XL = Layout("xl_model", "xl_controlnet", _XL_FILES, [*_configs(_XL_FILES), _INDEX])
_EXTRA_KEYS = {
    "scheduler": """
        trained_betas rescale_betas_zero_snr prediction_type beta_schedule variance_type timestep_spacing _class_name
        interpolation_type use_karras_sigmas
    """,
    "unet": """
        addition_embed_type class_embed_type num_class_embeds encoder_hid_dim time_cond_proj_dim act_fn
        transformer_layers_per_block only_cross_attention mid_block_type dual_cross_attention upcast_attention
        resnet_time_scale_shift use_linear_projection conv_in_kernel quantization_config _class_name
        _diffusers_version time_embedding_type flip_sin_to_cos freq_shift center_input_sample norm_eps
        num_attention_heads downsample_padding mid_block_scale_factor dropout attention_type
        addition_time_embed_dim projection_class_embeddings_input_dim addition_embed_type_num_heads
    """,
    "vae": """
        shift_factor latents_mean force_upcast use_quant_conv act_fn sample_size quantization_config
    """,
    "text_encoder": """
        hidden_act layer_norm_eps projection_dim rope_scaling architectures model_type auto_map
        quantization_config torch_dtype dtype attn_implementation tie_word_embeddings id2label
        transformers_version attention_dropout initializer_factor text_config output_attentions return_dict
    """,
    "tokenizer": """
        auto_map tokenizer_class added_tokens_decoder additional_special_tokens extra_special_tokens pad_token
        unk_token bos_token eos_token model_max_length errors add_prefix_space chat_template vocab_file
        tokenizer_file merges_file vocab merges name_or_path backend padding_side truncation_side
        model_input_names special_tokens_map_file clean_up_tokenization_spaces
    """,
    _INDEX: "force_zeros_for_empty_prompt add_watermarker _class_name unet tokenizer_2 text_encoder_2",
}

Recipe = Callable[[Case, Path, Layout], tuple[str, Sequence[object]]]
"""Changes a copy of an honest model; what is hostile about it, in words, and further flags."""


def hostile_model(case: Case, rank: int, layout: Layout = SD) -> tuple[str, Sequence[str], bool]:
    """The `rank`-th: what is hostile about it, the command line, and whether it is an honest one."""
    recipe = _RECIPES[rank % len(_RECIPES)]
    model = copy_tree(originals() / layout.model, case.inputs / "model")
    what, more = recipe(case, model, layout)
    return what, model_words(model, case.out / "run", *more), recipe is _honest


def _honest(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    return "nothing", pick(case, ((), ("--use_ema",), ("--pretrained_vae_model_name_or_path", model / "vae")))


def _any_file(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    names = some(case, layout.choices, most=3)
    done = [f"{Path(name).parent.name}/{mutate_file(case, model / name, _extra(name))}" for name in names]
    return ", ".join(done), ()


def _config(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    name = pick(case, layout.configs)
    before = (model / name).read_bytes()
    after = mutated_json(case, before, _extra(name))
    _replace(model / name, after)
    return f"{name} mutated", ()


def _value(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    """One key, one value, both in the message: nearly all of the ways in which a configuration can be wrong."""
    name = pick(case, layout.configs)
    config = json.loads((model / name).read_bytes())
    key = pick(case, [*config, *_extra(name)])
    value = snippet(case)
    config[key] = "@@"
    _replace(model / name, json.dumps(config).replace('"@@"', value).encode("utf-8", "surrogatepass"))
    return f"{name}: {key} is {value[:60]!a}", ()


def _large_number(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    name = pick(case, layout.configs)
    config = json.loads((model / name).read_bytes())
    key = pick(case, [key for key, value in config.items() if _is_number(value) or isinstance(value, list)])
    number = pick(case, (10**5, 10**6, 10**9, 2**31, 2**40, 2**63, -1, 0, 1, 7, 1e9, 0.5))
    value = config[key]
    if isinstance(value, list):
        numbers = [number if index == 0 or case.chance(0.5) else item for index, item in enumerate(value)]
        config[key] = numbers if case.chance(0.7) else value * pick(case, (2, 50, 3000))
    else:
        config[key] = number
    _replace(model / name, json.dumps(config).encode())
    return f"{name}: {key} is {config[key]!r:.60}", ()


def _missing_keys(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    name = pick(case, layout.configs)
    config = json.loads((model / name).read_bytes())
    for key in [key for key in config if case.chance(0.3)]:
        del config[key]
    _replace(model / name, json.dumps(config).encode())
    return f"{name} without keys", ()


def _text_for_a_config(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    """diffusers takes a text for the name of another folder, or of a repository."""
    name = pick(case, layout.configs)
    elsewhere = copy_tree(originals() / layout.model, case.inputs / "another")
    text = pick(
        case, (str(elsewhere / Path(name).parent), str(elsewhere), "some/model", str(case.outside), hostile_text(case))
    )
    _replace(model / name, json.dumps(text).encode("utf-8", "surrogatepass"))
    return f"{name} is the text {text[:60]!a}", ()


def _weights(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    name = pick(case, layout.weights)
    content = (model / name).read_bytes()
    _replace(model / name, mutated_safetensors(case, content))
    return f"{name} mutated", ()


def _pickled(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    path = model / pick(case, layout.weights)
    path.unlink()
    name = "pytorch_model.bin" if path.parent.name.startswith("text_encoder") else "diffusion_pytorch_model.bin"
    content = pick(
        case,
        (
            malicious_pickle,
            malicious_torch_zip,
            lambda case: mutated_bytes(case, malicious_torch_zip(case)),
            lambda case: random_bytes(case, 3000),
            lambda case: b"PK\x03\x04" + random_bytes(case, 3000),
            lambda case: b"",
        ),
    )(case)
    if case.chance(0.15):
        return f"{displace(case, path.with_name(name))} of {path.parent.name}", ()
    path.with_name(name).write_bytes(content)
    return f"{path.parent.name}/{name}", ()


def _index(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    path = model / pick(case, layout.weights)
    honest = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": path.name, "conv_in.bias": path.name}}
    content = json.dumps(honest).encode()
    if case.chance(0.5):
        target = pick(
            case,
            (
                str(case.outside / "secret.txt"),
                "../../outside/secret.txt",
                "/dev/zero",
                "",
                ".",
                "..",
                "a/b",
                "x.bin",
                hostile_text(case),
            ),
        )
        content = json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": target}}).encode()
    elif case.chance(0.8):
        content = mutated_json(case, content, ("weight_map",))
    _replace(path.with_name(f"{path.name}.index.json"), content)
    if case.chance(0.3):
        path.unlink()
    return f"{path.parent.name}/{path.name}.index.json", ()


def _tokenizer(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    folder = model / pick(case, layout.tokenizers)
    action = case.below(6)
    if action == 0:
        _replace(
            folder / "tokenizer.json",
            pick(case, (b"{}", b"null", snippet(case).encode("utf-8", "surrogatepass"), _tokenizer_json(case))),
        )
        return "tokenizer.json planted", ()
    if action == 1:
        vocabulary = json.loads((folder / "vocab.json").read_bytes())
        value = pick(case, (10**6, -1, 2**31, 2**63, 0))
        vocabulary[pick(case, list(vocabulary))] = value
        _replace(folder / "vocab.json", json.dumps(vocabulary).encode())
        return f"vocab.json: an id is {value}", ()
    if action == 2:
        lines = pick(
            case,
            ("a", "a b c", "a b\na b", "\x00 b", f"{'x' * 10**6} y", "#version: 0.2\n\n\n", "猫 猫", "a b\n" * 200_000),
        )
        _replace(folder / "merges.txt", f"#version: 0.2\n{lines}\n".encode())
        return f"merges.txt: {lines[:40]!a}", ()
    if action == 3:
        name = pick(case, ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "tokenizer.model"))
        _replace(folder / name, pick(case, (snippet(case).encode("utf-8", "surrogatepass"), random_bytes(case, 500))))
        return f"{name} planted", ()
    if action == 4:
        script = f"import os\nos.mkdir({str(case.executed)!r})\nclass Evil: pass\n"
        (folder / "evil.py").write_text(script)
        config = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
        _replace(folder / "tokenizer_config.json", json.dumps(config).encode())
        return "a tokenizer of its own code", ()
    value = pick(case, ("0", "-1", "1", "2", "1.5", '"77"', "null", "10000000", "4096", "true", "[77]", "1e400"))
    config = json.loads((folder / "tokenizer_config.json").read_bytes()) | {"model_max_length": "@@"}
    _replace(folder / "tokenizer_config.json", json.dumps(config).replace('"@@"', value).encode())
    return f"model_max_length is {value}", ()


def _tokenizer_json(case: Case) -> bytes:
    honest: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
    }
    return mutated_json(case, json.dumps(honest).encode())


def _another_part(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    """A flag that names another model, whose folder is the mutated one."""
    honest, part = originals() / layout.model, case.inputs / "part"
    flag, sources = pick(
        case,
        (
            ("--controlnet_model_name_or_path", {"": originals() / layout.controlnet}),
            ("--pretrained_vae_model_name_or_path", {"": honest / "vae"}),
            (
                "--tokenizer_name",
                {"": honest / "tokenizer"}
                if len(layout.tokenizers) == 1
                else {name: honest / name for name in layout.tokenizers},
            ),
        ),
    )
    for place, source in sources.items():
        copy_tree(source, part / place)
    what = mutate_file(case, pick(case, files_in(part)), _extra("unet/config.json"))
    return f"{flag}: {what}", (flag, part)


def _folder(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    """A part's folder replaced, exchanged for another's, or the whole model's."""
    part = model / pick(case, layout.parts)
    action = case.below(4)
    if action == 0:
        return f"{displace(case, part)}", ()
    if action == 1:
        return f"{displace(case, model)}", ()
    if action == 2:
        other = model / pick(case, layout.parts)
        shutil.rmtree(part) if other != part else None
        if other != part:
            copy_tree(other, part)
        return f"{part.name} is {other.name}", ()
    return plant(case, part), ("--variant", pick(case, ("fp16", "../x", "a\nFORGED", "*", "")) or "x")


def _addresses(case: Case, model: Path, layout: Layout) -> tuple[str, Sequence[object]]:
    address = hostile_address(case).replace("\x00", "") or "x"
    flag = pick(case, ("--controlnet_model_name_or_path", "--pretrained_vae_model_name_or_path", "--tokenizer_name"))
    return f"{flag} {address[:80]!a}", (flag, address)


def _replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # a hard link to the original
    path.write_bytes(content)


def _extra(name: str) -> tuple[str, ...]:
    return tuple(_EXTRA_KEYS.get(name.partition("/")[0].removesuffix("_2"), "").split())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_RECIPES: Sequence[Recipe] = (
    _value,
    _any_file,
    _config,
    _large_number,
    _value,
    _tokenizer,
    _weights,
    _value,
    _any_file,
    _index,
    _value,
    _large_number,
    _config,
    _another_part,
    _value,
    _missing_keys,
    _pickled,
    _any_file,
    _folder,
    _value,
    _text_for_a_config,
    _honest,
    _tokenizer,
    _value,
    _addresses,
)
