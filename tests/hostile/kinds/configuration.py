"""Command lines and YAML files, read for either backend, and what is checked of them before a device is touched."""

import json
import os
from collections.abc import Callable, Sequence

import shared.compare.__main__ as compare
from shared.config import TrainConfig, parse_command_line, to_yaml
from shared.config.demo import BASE_MODEL
from shared.config.options import FLAGS, Backend
from shared.outgoing.messages import set_up_logging
from shared.run.setup import prepare
from tests.hostile.case import Case
from tests.hostile.kinds import place_of
from tests.hostile.mutations.addresses import hostile_address
from tests.hostile.mutations.pictures import hostile_picture
from tests.hostile.mutations.places import displace
from tests.hostile.mutations.values import hostile_text, mutated_yaml, number, pick
from tests.hostile.signs import signs_in_files
from tests.hostile.watched import Attempt

Recipe = Callable[[Case], tuple[str, Sequence[str]]]
"""What is hostile about it, in words, and the command line."""


def build(case: Case) -> Attempt:
    """A case of its recipe, whose number says which."""
    recipe = _RECIPES[place_of(case.number).rank % len(_RECIPES)]
    what, words = recipe(case)
    backend: Backend = pick(case, ("flax", "torch"))

    def run() -> int:
        set_up_logging("shared")
        prepare(parse_command_line(words, backend), backend)
        return 0

    def compare_instead() -> int:
        return compare.main(list(words))

    if recipe is _comparison:
        return Attempt(what, compare_instead)
    return Attempt(
        f"{what}: {ascii(' '.join(words))[-200:]}",
        run,
        lambda: signs_in_files(case, case.out),
        is_honest=recipe is _nothing,
    )


def _honest(case: Case) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(BASE_MODEL), "--generated_circles", "8", "--resolution", "64"),
        *("--max_train_steps", "4", "--report_to", "none", "--output_dir", str(case.out / "run")),
    ]


def _given(text: str) -> str:
    """As the operating system would hand it over: without NUL, which ends an argument."""
    return text.replace("\x00", "")


def _value_of_chance(case: Case) -> tuple[str, Sequence[str]]:
    words = _honest(case)
    for _ in range(1 + case.below(2)):
        flag = pick(case, list(FLAGS.values()))
        value = number(case) if flag.kind in (int, float) and case.chance(0.8) else hostile_text(case)
        words += [f"--{flag.name}", _given(value)] if case.chance(0.7) else [f"--{flag.name}={_given(value)}"]
    return "a flag's value", words


def _numbers(case: Case) -> tuple[str, Sequence[str]]:
    flag = pick(case, [flag for flag in FLAGS.values() if flag.kind in (int, float)])
    return "a number", [*_honest(case), f"--{flag.name}", number(case)]


def _paths(case: Case) -> tuple[str, Sequence[str]]:
    names = (
        "pretrained_model_name_or_path",
        "controlnet_model_name_or_path",
        "pretrained_vae_model_name_or_path",
        "tokenizer_name",
        "train_data_dir",
        "dataset_name",
        "train_shards",
        "validation_image",
        "output_dir",
        "logging_dir",
        "cache_dir",
        "resume_from_checkpoint",
        "revision",
        "variant",
        "hub_model_id",
        "ccache",
        "tracker_project_name",
        "coordinator_address",
        "allowed_data_dirs",
    )
    name = pick(case, names)
    words = _honest(case)
    if name in ("train_data_dir", "dataset_name", "train_shards"):
        del words[2:4]
    if name == "validation_image":
        words += ["--validation_prompt", _given(hostile_text(case))]
    return "an address", [*words, f"--{name}", _given(hostile_address(case))]


def _displaced(case: Case) -> tuple[str, Sequence[str]]:
    """Something else than a file or folder where one is named."""
    name, suffix = pick(
        case,
        (
            ("config", ".yaml"),
            ("validation_image", ".png"),
            ("train_data_dir", ""),
            ("output_dir", ""),
            ("tokenizer_name", ""),
            ("pretrained_model_name_or_path", ""),
            ("train_shards", ".tar"),
            ("resume_from_checkpoint", ""),
        ),
    )
    path = case.inputs / f"{'checkpoint-2' if name == 'resume_from_checkpoint' else 'x'}{suffix}"
    what = displace(case, path)
    words = _honest(case)
    if name in ("train_data_dir", "train_shards"):
        del words[2:4]
    if name == "validation_image":
        words += ["--validation_prompt", "a"]
    return f"{what} as --{name}", [*words, f"--{name}", str(path)]


def _words_of_chance(case: Case) -> tuple[str, Sequence[str]]:
    words = _honest(case)
    for _ in range(1 + case.below(3)):
        word = pick(
            case, (_given(hostile_text(case)), "--", "---", "--=", "--no_", "--no_seed", "--seed=", "-x", "--SEED", "=")
        )
        words.insert(case.below(len(words) + 1), word)
    return "words", words


def _undecodable(case: Case) -> tuple[str, Sequence[str]]:
    """Bytes that are no UTF-8 arrive as half surrogates."""
    name = pick(
        case, ("validation_prompt", "output_dir", "tracker_project_name", "train_data_dir", "hub_model_id", "config")
    )
    words = [*_honest(case), f"--{name}", os.fsdecode(b"a \xff\xfe cat")]
    if name == "validation_prompt":
        words += ["--validation_image", str(case.outside / "private.png")]
    return "bytes that are no UTF-8", words


def _secret(case: Case) -> tuple[str, Sequence[str]]:
    """A token in a wrong place: whoever reads the error may post it somewhere."""
    token = case.secret
    url = f"https://user:{token}@host.example/model"
    words = pick(
        case,
        (
            ["--seed", token],
            ["--push_to_hub", token],
            ["--push_to_hub", "--hub_token", "--report_to", token],
            [f"--hub_token:{token}"],
            [f"--hub_token:={token}"],
            [f"--hub_tokn={token}"],
            [f"--hub_tokn{token}"],
            ["--hub_tokn", token],
            ["--hub-token", token],
            [f"--hub-token={token}"],
            ["--hub_token", token, token],
            [f"--{token}"],
            [f"--no_{token}"],
            ["--no_streaming", token],
            ["--mixed_precision", token],
            ["--resolution", token],
            ["--learning_rate", token],
            ["--report_to", "wandb", "--hub_token", token],
            ["--hub_token", token, "--seed", "-1"],
            ["--pretrained_model_name_or_path", url],
            ["--pretrained_model_name_or_path", f"https://host.example/model?token={token}"],
            ["--tokenizer_name", url],
            ["--controlnet_model_name_or_path", url, "--seed", "-1"],
            ["--dataset_name", url],
            ["--train_data_dir", url],
            # No scheme that is read: for https, webdataset starts curl, as it should.
            ["--train_shards", f"htgs://host.example/{{0..3}}.tar?token={token}"],
            ["--train_shards", f"https://user:{token}@host.example/{{0..3.tar"],
            ["--train_shards", f"pipe:curl -H 'Authorization: {token}' https://host.example/x.tar"],
            ["--train_shards", f" pipe:curl -H 'Authorization: {token}' https://host.example/x.tar"],
            ["--train_shards", f"\tPIPE:curl {token}"],
            ["--train_shards", f"s3://key:{token}@bucket/x.tar"],
            ["--train_shards", f"unknown://key:{token}@bucket/x.tar"],
            ["--resume_from_checkpoint", url],
            ["--config", url],
            ["--validation_image", url, "--validation_prompt", "a"],
            ["--coordinator_address", f"user:{token}@host", "--num_processes", "2", "--process_id", "0"],
        ),
    )
    honest = _honest(case)
    if any(word in ("--dataset_name", "--train_data_dir", "--train_shards") for word in words):
        del honest[2:4]
    return "a secret", [token, *honest] if case.chance(0.04) else [*honest, *words]


def _secret_in_yaml(case: Case) -> tuple[str, Sequence[str]]:
    token = case.secret
    line = pick(
        case,
        (
            f"{token}: 1",
            f"hub_token: [{token}]",
            f"hub_token {token}",
            f"hub_tokn: {token}",
            f"seed: {token}",
            f"hub_token: *{token}",
            f"hub_token: !{token} x",
            f"hub_token: !!{token} x",
            f"hub_token: '{token}",
            f"- {token}",
            f"{token}",
            f"hub_token: {{{token}: 1}}",
            f"push_to_hub: {token}",
            f"? {token}\n: 1",
            f"hub_token: &{token} a: b",
            f"hub_token: {token}\nhub_token: {token}",
            f"hub_token: {token}\n\tseed: 1",
            f"hub_token: {token}\x00",
            f"report_to: wandb\nhub_token: {token}",
            f'hub_token: "{token}\\q"',
            f"hub_token:{token}",
            f"%{token}",
            f"pretrained_model_name_or_path: https://user:{token}@host.example/x",
        ),
    )
    path = case.inputs / "x.yaml"
    path.write_text(line + "\n")
    words = [
        word
        for word in _honest(case)
        if "pretrained" not in line or word not in ("--pretrained_model_name_or_path", str(BASE_MODEL))
    ]
    return f"a secret in YAML ({line.replace(token, 'TOKEN')!a})"[:150], [*words, "--config", str(path)]


def _yaml(case: Case) -> tuple[str, Sequence[str]]:
    config = TrainConfig(
        pretrained_model_name_or_path=str(BASE_MODEL),
        generated_circles=8,
        resolution=64,
        max_train_steps=4,
        report_to="none",
        output_dir=str(case.out / "run"),
    )
    path = case.inputs / "x.yaml"
    path.write_bytes(mutated_yaml(case, to_yaml(config).encode()))
    return "YAML mutated", ["--config", str(path)]


def _yaml_of_values(case: Case) -> tuple[str, Sequence[str]]:
    flag = pick(case, list(FLAGS.values()))
    path = case.inputs / "x.yaml"
    text = f"{flag.name}: {json.dumps(hostile_text(case), ensure_ascii=case.chance(0.5))}\n"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return "a text in YAML", [*_honest(case), "--config", str(path)]


def _comparison(case: Case) -> tuple[str, Sequence[str]]:
    words = [
        _given(
            pick(
                case, (hostile_text(case), hostile_address(case), "--output_dir", str(case.outside), str(case.out), "a")
            )
        )
        for _ in range(case.below(5))
    ]
    if words and words[0].startswith("--"):  # which would train two models
        words.insert(0, "a")
    return "a comparison's command line", words


def _validation_picture(case: Case) -> tuple[str, Sequence[str]]:
    name, content = hostile_picture(case)
    path = case.inputs / "condition.png"
    path.write_bytes(content)
    prompt = _given(hostile_text(case))
    return name, [*_honest(case), "--validation_image", str(path), "--validation_prompt", prompt]


def _nothing(case: Case) -> tuple[str, Sequence[str]]:
    return "nothing", _honest(case)


_RECIPES: Sequence[Recipe] = (
    _value_of_chance,
    _validation_picture,
    _nothing,
    _yaml,
    _secret,
    _paths,
    _numbers,
    _secret_in_yaml,
    _displaced,
    _secret,
    _words_of_chance,
    _yaml,
    _undecodable,
    _yaml_of_values,
    _secret,
    _paths,
    _comparison,
)
