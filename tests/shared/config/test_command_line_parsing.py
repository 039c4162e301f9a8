"""How words become a configuration, and how mistakes are told."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.config import TrainConfig, parse_command_line

_BASE = ["--pretrained_model_name_or_path", "model", "--generated_circles", "8"]
# A word that begins with two dashes is a flag; anything else may be a value.
_WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp", "Cf"]), min_size=1).filter(
    lambda word: not word.startswith("--")
)


def _parse(*argv: str) -> TrainConfig:
    return parse_command_line([*_BASE, *argv], "torch")


def _message(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_command_line(argv, "torch")
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("train_torch.py: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_flags_not_given_have_the_defaults() -> None:
    assert _parse() == TrainConfig(pretrained_model_name_or_path="model", generated_circles=8)


def test_the_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        _parse().seed = 1  # type: ignore[misc]


def test_both_spellings_of_an_assignment_are_the_same() -> None:
    assert _parse("--seed", "3", "--output_dir", "a b") == _parse("--seed=3", "--output_dir=a b")


def test_a_value_may_hold_an_equals_sign() -> None:
    assert _parse("--revision=a=b", "--variant==c").revision == "a=b"
    assert _parse("--variant==c").variant == "=c"


def test_values_have_the_types_of_their_fields() -> None:
    config = _parse("--train_batch_size", "2", "--learning_rate", "1", "--max_grad_norm", "inf", "--revision", "12")
    assert (config.train_batch_size, config.learning_rate, config.max_grad_norm) == (2, 1.0, float("inf"))
    assert isinstance(config.learning_rate, float)
    assert config.revision == "12"


def test_negative_numbers_are_values() -> None:
    assert _parse("--local_rank", "-2").local_rank == -2
    assert _parse("--local_rank=-3").local_rank == -3


@given(st.lists(_WORDS, min_size=1, max_size=4), st.lists(_WORDS, min_size=1, max_size=1))
def test_lists_take_any_words_up_to_the_next_flag(prompts: list[str], images: list[str]) -> None:
    config = _parse("--validation_prompt", *prompts, "--validation_image", *images)
    assert config.validation_prompt == tuple(prompts)
    assert config.validation_image == tuple(images)


def test_an_inline_value_may_begin_with_dashes() -> None:
    config = _parse("--validation_prompt=--a", "-b", "--validation_image", "x.png")
    assert config.validation_prompt == ("--a", "-b")


def test_the_last_of_repeated_flags_counts() -> None:
    prompts = ["--validation_prompt", "a", "b", "--validation_prompt", "c", "--validation_image", "x"]
    config = _parse("--seed=1", *prompts, "--seed=2")
    assert config.seed == 2
    assert config.validation_prompt == ("c",)


def test_a_switch_is_turned_on_and_off() -> None:
    assert _parse("--push_to_hub").push_to_hub is True
    assert _parse("--push_to_hub", "--no_push_to_hub").push_to_hub is False
    assert _parse("--no_push_to_hub", "--push_to_hub").push_to_hub is True


def test_the_time_stands_in_the_output_directory() -> None:
    assert re.fullmatch(r"runs/\d{8}_\d{6}-x", _parse("--output_dir", "runs/{timestamp}-x").output_dir)


@pytest.mark.parametrize(
    ("given_flag", "meant"),
    [
        ("--train_batchsize", "--train_batch_size"),
        ("--train-batch-size", "--train_batch_size"),
        ("--train-batch-size=3", "--train_batch_size"),
        ("--TRAIN_BATCH_SIZE", "--train_batch_size"),
        ("--learning", "--learning_rate"),
        ("--no-streaming", "--no_streaming"),
        ("--no_seed", "--seed"),
        ("--print-config", "--print_config"),
    ],
)
def test_an_unknown_flag_is_an_error_that_suggests_the_closest(
    capsys: pytest.CaptureFixture[str], given_flag: str, meant: str
) -> None:
    name = given_flag.partition("=")[0]
    assert f"unknown flag {name}; did you mean {meant}?\n" in _message(capsys, *_BASE, given_flag)


def test_a_flag_like_no_other_points_to_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown flag --zqxj; --help lists them all." in _message(capsys, "--zqxj", "1")


@pytest.mark.parametrize(
    ("argv", "explanation"),
    [
        (["stray"], "'stray' stands before the first flag"),
        (["--seed"], "--seed needs a value, a whole number"),
        (["--seed", "1.5"], "--seed must be a whole number, but it is '1.5'"),
        (["--learning_rate=fast"], "--learning_rate must be a number, but it is 'fast'"),
        (["--output_dir", "a", "b"], "--output_dir takes one value, but 2 words follow it"),
        (["--validation_prompt"], "--validation_prompt needs a value"),
        (["--streaming", "5"], "--streaming is either true or false, but was given '5'"),
        (["--no_streaming", "5"], "--no_streaming takes no value"),
        (["--mixed_precision", "fp8"], "--mixed_precision must be one of no, fp16, bf16, but it is 'fp8'"),
        (["--report_to", "comet_ml"], "--report_to must be one of tensorboard, wandb, none"),
        (["--resolution", "500"], "--resolution must be divisible by 8"),
        (["--config", "absent.yaml"], "--config 'absent.yaml' cannot be read"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], explanation: str
) -> None:
    arguments = argv if argv == ["stray"] else [*_BASE, *argv]
    assert explanation in _message(capsys, *arguments)


def test_a_token_is_not_repeated_in_a_message_or_in_the_repr(capsys: pytest.CaptureFixture[str]) -> None:
    assert "hf_abc" not in _message(capsys, *_BASE, "--hub_token", "hf_abc", "hf_abc")
    assert "hf_abc" not in _message(capsys, *_BASE, "--hub_token=hf_abc", "--report_to=wandb")
    assert "hf_abc" not in repr(_parse("--hub_token", "hf_abc"))
    assert _parse("--hub_token", "hf_abc").hub_token == "hf_abc"
