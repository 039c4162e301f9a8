"""--config and --print_config."""

import dataclasses
import pathlib
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shared.config import TrainConfig, parse_command_line, to_yaml
from shared.config.arguments import value_of
from shared.config.command_line import read_configuration
from shared.config.flags import Flag
from shared.config.options import FLAGS
from shared.config.yaml_io import read_yaml

_BASE = ["--pretrained_model_name_or_path", "model", "--generated_circles", "8"]


def _parse_file(tmp_path: pathlib.Path, text: str, *argv: str) -> TrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_command_line([*_BASE, "--config", str(path), *argv], "torch")


def _error(tmp_path: pathlib.Path, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        _parse_file(tmp_path, text)
    assert stop.value.code == 2
    return capsys.readouterr().err


# What no flag takes, see test_texts_that_no_flag_takes.
_TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp", "Cf"]))


def _values(flag: Flag) -> st.SearchStrategy[Any]:
    if flag.choices:
        return st.sampled_from(flag.choices)
    by_kind: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(-(2**63) + 1, 2**63 - 1),
        float: st.floats(allow_nan=False),
        str: _TEXTS,
    }
    values = by_kind[flag.kind]
    if flag.is_list:
        values = st.lists(values, min_size=1, max_size=3).map(tuple)
    return st.none() | values if flag.is_optional else values


_CONFIGS = st.builds(TrainConfig, **{name: _values(flag) for name, flag in FLAGS.items() if name != "hub_token"})


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("config") / "config.yaml"


def _read_back(path: pathlib.Path, config: TrainConfig) -> TrainConfig:
    path.write_text(to_yaml(config), encoding="utf-8")
    return TrainConfig(**{given.name: value_of(given, FLAGS[given.name]) for given in read_yaml(str(path), FLAGS)})


@given(text=_TEXTS | st.sampled_from(["no", "null", "~", "1.0", ".inf", "\u200d", "\ufeff", "a: b #c"]))
def test_any_text_survives_yaml(config_path: pathlib.Path, text: str) -> None:
    config = TrainConfig(revision=text, validation_prompt=(text, text))
    assert _read_back(config_path, config) == config


def test_what_was_one_value_and_may_be_several_is_read_as_it_was_written(tmp_path: pathlib.Path) -> None:
    """By runs of when a sample had one condition."""
    words = _with_file(tmp_path, "conditioning_channels: 1\nconditioning_image_column: edges\n")
    config = read_configuration(words)
    assert (config.conditioning_channels, config.conditioning_image_column) == ((1,), ("edges",))
    (tmp_path / "now.yaml").write_text(to_yaml(config))
    assert read_configuration(["--config", str(tmp_path / "now.yaml")]) == config


@given(lines=st.lists(_TEXTS), separator=st.sampled_from(["\n", "\r\n", "\r", "\t"]))
def test_prompts_of_several_lines_survive_yaml(config_path: pathlib.Path, lines: list[str], separator: str) -> None:
    config = TrainConfig(validation_prompt=(separator.join(lines), separator))
    assert _read_back(config_path, config) == config


@given(config=_CONFIGS)
def test_any_configuration_survives_yaml(config_path: pathlib.Path, config: TrainConfig) -> None:
    assert _read_back(config_path, config) == config


def test_what_print_config_prints_gives_the_same_configuration(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        *(*_BASE, "--learning_rate=1e-5", "--mixed_precision=no", "--output_dir=runs/{timestamp}", "--push_to_hub"),
        *("--validation_prompt", "-a: b", "null", "", "--validation_image", "é.png", "--max_grad_norm=inf"),
    ]
    with pytest.raises(SystemExit) as stop:
        parse_command_line([*argv, "--print_config"], "torch")
    printed = capsys.readouterr()
    assert stop.value.code == 0
    assert printed.err == ""
    path = tmp_path / "printed.yaml"
    path.write_text(printed.out, encoding="utf-8")
    config = parse_command_line(["--config", str(path)], "torch")
    assert to_yaml(config) == printed.out
    expected = parse_command_line([*argv, "--output_dir", config.output_dir], "torch")
    assert config == expected
    assert "{timestamp}" not in config.output_dir


def test_what_turns_a_line_round_is_escaped_and_nothing_else() -> None:
    text = to_yaml(TrainConfig(validation_prompt=("a \u202egnp.x\u2066", "naïve 猫", "two\nlines of 猫")))
    assert text.splitlines().count(r'- "a \u202Egnp.x\u2066"') == 1
    assert "- naïve 猫" in text
    assert "\u202e" not in text


def test_the_yaml_is_plain_and_holds_every_flag_but_the_token() -> None:
    config = TrainConfig(validation_prompt=("a",), hub_token="hf_abc", mixed_precision="no")
    assert "hf_abc" not in to_yaml(config)
    values = yaml.safe_load(to_yaml(config))
    assert list(values) == [name for name in FLAGS if name != "hub_token"]
    assert values["validation_prompt"] == ["a"]
    assert values["mixed_precision"] == "no"
    assert values["learning_rate"] == 5e-6


def test_scalars_are_taken_as_written(tmp_path: pathlib.Path) -> None:
    text = """
        mixed_precision: no        # a boolean to YAML 1.1
        learning_rate: 1e-5        # a text to YAML 1.1
        revision: 1.10             # not 1.1
        push_to_hub: True
        max_train_steps: null
        validation_image: x.png
        validation_prompt: [no, --dashes]
    """
    config = _parse_file(tmp_path, text)
    assert (config.mixed_precision, config.learning_rate, config.revision) == ("no", 1e-5, "1.10")
    assert config.push_to_hub is True
    assert config.max_train_steps is None
    assert config.validation_image == ("x.png",)
    assert config.validation_prompt == ("no", "--dashes")


def test_the_command_line_wins_wherever_config_stands(tmp_path: pathlib.Path) -> None:
    text = "seed: 1\npush_to_hub: true\nscale_lr: true\nvalidation_prompt: [a, b]\nvalidation_image: x\n"
    before = parse_command_line(["--seed", "2", *_with_file(tmp_path, text)], "torch")
    after = _parse_file(tmp_path, text, "--seed=2", "--no_push_to_hub", "--validation_prompt", "c")
    assert before.seed == after.seed == 2
    assert (before.push_to_hub, after.push_to_hub) == (True, False)
    assert after.scale_lr is True
    assert after.validation_prompt == ("c",)


def _with_file(tmp_path: pathlib.Path, text: str) -> list[str]:
    path = tmp_path / "before.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path), *_BASE]


def test_an_empty_file_changes_nothing(tmp_path: pathlib.Path) -> None:
    assert _parse_file(tmp_path, "# nothing\n") == parse_command_line(_BASE, "torch")


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        ("seed: 1\ntrain_batchsize: 3\n", "line 2: train_batchsize is not a flag; did you mean train_batch_size?"),
        ("train-batch-size: 3\n", "did you mean train_batch_size?"),
        ("config: other.yaml\n", "config is not a flag"),
        ("print_config: true\n", "print_config is not a flag"),
        ("no_streaming: true\n", "did you mean streaming?"),
        ("seed: 1\nseed: 2\n", "line 2: seed is given twice"),
        ("seed: one\n", "line 1: seed must be a whole number, but it is 'one'"),
        ("seed: null\n", "line 1: seed cannot be null"),
        ("seed: [1]\n", "line 1: seed must be of type int"),
        ("validation_prompt: {a: b}\n", "validation_prompt must be of type str list"),
        ("validation_prompt: [[a]]\n", "validation_prompt must be of type str list"),
        ("validation_prompt: []\n", "validation_prompt must be of type str list"),
        ("streaming: perhaps\n", "line 1: streaming is either true or false"),
        ("? [a]\n: 1\n", "a nested key is not a flag"),
        ("- seed\n", "must hold one `flag: value` per line"),
        ("seed: [\n", "is not valid YAML"),
        ("seed: 1\n\nhub_token: [hf_abc\nresolution: 512\n", "config.yaml' is not valid YAML in line 4: "),
    ],
)
def test_mistakes_in_the_file_are_told_with_their_place(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], text: str, explanation: str
) -> None:
    assert explanation in _error(tmp_path, text, capsys)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("hub_token: hf_SECRET: x\n", 1),
        ("seed: 1\nhub_token: 'hf_SECRET\n", 3),
        ("seed: 1\nhub_token: [hf_SECRET\n", 3),
        ("hub_token: &hf_SECRET\n  *hf_SECRETS\n", 2),
        ("hub_token: !<hf_SECRET x\n", 1),
        ("hub_token: @hf_SECRET\n", 1),
        ('train_shards: "pipe:curl -H \\q SECRET"\n', 1),
        ("hub_token: %hf_SECRET\n", 1),
        ("seed: 1\n\thub_token: hf_SECRET\n", 2),
        ("{hub_token: hf_SECRET}}\n", 1),
        ("hub_token: *hf_SECRET\n", 1),
        ("hub_token: !SECRET!x y\n", 1),
        ("hub_token: hf_SECRET\x07\n", None),
    ],
)
def test_a_file_that_is_no_yaml_is_not_quoted(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], text: str, line: int | None
) -> None:
    message = _error(tmp_path, text, capsys)
    assert "is not valid YAML" in message
    assert line is None or f" in line {line}: " in message
    assert "SECRET" not in message


@given(before=st.integers(0, 4), broken=st.sampled_from([": :", "- ]", "'", '"', "[", "{", "@", "`", "&", "%", "| x"]))
def test_no_way_of_breaking_a_line_shows_what_it_holds(config_path: pathlib.Path, before: int, broken: str) -> None:
    lines = ["hub_token: SECRETSECRET"] * before + [f"revision: {broken} SECRETSECRET"]
    config_path.write_text("\n".join(lines), encoding="utf-8")
    assert "SECRET" not in _refusal(config_path)


def _refusal(path: pathlib.Path) -> str:
    try:
        read_yaml(str(path), FLAGS)
    except ValueError as error:
        return str(error)
    return ""


def test_print_config_still_checks_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_command_line([*_BASE, "--print_config", "--resolution=500"], "torch")
    assert stop.value.code == 2
    assert capsys.readouterr().out == ""


def test_print_config_asks_for_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    absent = ["--train_data_dir", "/absent", "--pretrained_model_name_or_path", "/absent", "--print_config"]
    with pytest.raises(SystemExit) as stop:
        parse_command_line(absent, "torch")
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["train_data_dir"] == "/absent"


def test_every_field_of_the_configuration_is_a_flag() -> None:
    assert [field.name for field in dataclasses.fields(TrainConfig)] == list(FLAGS)
