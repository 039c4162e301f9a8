"""A token in a wrong place is never printed, and nothing of a flag reaches a terminal as it is."""

import contextlib
import io
import os
import pathlib
import string
import tempfile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shared.config import parse_command_line
from shared.config.flags import Flag
from shared.config.options import FLAGS

_BASE = ["--pretrained_model_name_or_path", "model", "--generated_circles", "8"]
_TOKENS = [
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
    "ghp_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789",
    "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
    "AKIAIOSFODNN7EXAMPLE",
    "sk-proj-AbCdEfGhIjKlMnOpQrStUvWx",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVPmB92K27uhbUJU1p1r",
    "0123456789abcdef0123456789abcdef01234567",
    "9f86d081-884c-7d65-9a2f-eaa0c55ad015",
    "Zm9vYmFyYmF6cXV4Zm9vYmFy+/==",
]
_TEXT_FLAGS = [flag for flag in FLAGS.values() if flag.kind is str]
_NOT_TEXT = [flag for flag in FLAGS.values() if flag.kind is not str or flag.choices]

_each_token = pytest.mark.parametrize("token", _TOKENS)


def _told(*argv: str) -> str:
    """All that a command line that must fail prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        parse_command_line(argv, "torch")
    assert stop.value.code == 2
    assert out.getvalue() == ""
    assert err.getvalue().count("\n") == 1
    assert len(err.getvalue()) < 1000
    return err.getvalue()


def _one_of(texts: list[str], flag: Flag) -> str:
    """All of them come up, and a flag alone need not try them all: how a token looks does not depend on the flag."""
    return texts[list(FLAGS).index(flag.name) % len(texts)]


def _has_a_part_of(secret: str, told: str) -> bool:
    return any(secret[place : place + 6] in told for place in range(len(secret) - 5))


@pytest.mark.parametrize("flag", _NOT_TEXT, ids=lambda flag: flag.name)
def test_a_token_after_a_flag_of_another_kind_is_not_told(flag: Flag) -> None:
    token = _one_of(_TOKENS, flag)
    for words in ([f"--{flag.name}", token], [f"--{flag.name}={token}"], [f"--{flag.name}", "1", token]):
        told = _told(*_BASE, *words)
        assert f"--{flag.name}" in told
        assert not _has_a_part_of(token, told)
    assert not _has_a_part_of(token, _told(*_BASE, f"--no_{flag.name}", token))


@pytest.mark.parametrize("flag", FLAGS.values(), ids=lambda flag: flag.name)
def test_a_token_that_is_written_to_a_flags_name_is_not_told(flag: Flag) -> None:
    token = _one_of(_TOKENS, flag)
    for between in ("", ":", "_", "-", "/", ".", "\u00a0", "\x1b", "@"):
        for name in (flag.name, flag.name.replace("_", "-"), flag.name.upper(), flag.name.replace("_", "")):
            told = _told(*_BASE, f"--{name}{between}{token}")
            assert "unknown flag" in told
            assert not _has_a_part_of(token, told)
            assert f"did you mean --{flag.name}?" in told or name == flag.name.replace("_", "")


@_each_token
def test_a_token_that_stands_alone_is_not_told(token: str) -> None:
    for words in ([token], [f"--{token}"], [f"-{token}", *_BASE], [f"--{token}=1"], [f"---{token}"]):
        assert not _has_a_part_of(token, _told(*words))


@pytest.mark.parametrize("flag", [flag for flag in FLAGS.values() if not flag.is_list], ids=lambda flag: flag.name)
def test_a_token_as_a_second_value_is_not_told(flag: Flag) -> None:
    token = _one_of(_TOKENS, flag)
    assert not _has_a_part_of(token, _told(*_BASE, f"--{flag.name}", token, token))


@_each_token
def test_a_token_in_the_wrong_place_of_a_file_is_not_told(token: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "config.yaml"
    texts = [
        f"{token}: 1",
        f"'{token}': 1",
        f"{token}",
        f"- {token}",
        f"? {token}",
        f"? [{token}]\n: 1",
        f"!{token} x: 1",
    ]
    texts += [f"&{token} a: *{token}x", f"%{token}\n---\na: 1", f"a: b\n{token}", f"a: {{{token}", f"%TAG !{token}"]
    texts += [f"hub_token{between}{token}: 1" for between in ("", ":", ".", " ", "\u00a0", "_")]
    texts += [f"{flag.name}: {token}" for flag in _NOT_TEXT]
    texts += [f"{flag.name}: [{token}]" for flag in FLAGS.values() if not flag.is_list]
    texts += [f"{flag.name}: {{{token}: {token}}}" for flag in FLAGS.values()]
    for text in texts:
        file.write_text(text, encoding="utf-8")
        assert not _has_a_part_of(token, _told(*_BASE, "--config", str(file))), text


@given(
    before=st.sampled_from([f"--{flag.name}" for flag in _NOT_TEXT] + ["--", "--hub_token", "--hubtoken", "--x", ""]),
    between=st.sampled_from(["", "=", ":", "-", "_", " "]),
    secret=st.text(string.ascii_letters + string.digits, min_size=20, max_size=60).filter(
        lambda text: sum(map(str.isdigit, text)) > 3 and not text.isdigit()
    ),
)
@settings(deadline=None)
def test_random_tokens_are_not_told(before: str, between: str, secret: str) -> None:
    words = [before, secret] if between == " " else [f"{before}{between}{secret}"]
    if before == "--hub_token" and between in (" ", "="):
        words.append("--seed=x")
    if words[0]:
        assert not _has_a_part_of(secret, _told(*words))


@pytest.mark.parametrize(
    "address", ["https://user:PASSWORD@host/x", "https://host/x?token=PASSWORD", " pipe:curl PASSWORD"]
)
def test_addresses_lose_their_passwords_in_messages(address: str) -> None:
    for flag in FLAGS.values():
        if flag.name != "train_shards":
            assert "PASSWORD" not in _told(*_BASE, f"--{flag.name}", address, "--seed", "x")
            assert "PASSWORD" not in _told(*_BASE, f"--{flag.name}{address}")
    assert "PASSWORD" not in _told("--pretrained_model_name_or_path", "m", "--train_shards", address, "--seed", "x")
    assert "PASSWORD" not in _told("--config", address)


def test_a_command_with_blanks_in_front_is_a_command() -> None:
    for address in (" pipe:curl PASSWORD", "\u2003pipe:x", "  PIPE:curl"):
        told = _told(
            "--pretrained_model_name_or_path", "m", "--train_shards", address, "--max_train_steps=1", "--seed=x"
        )
        assert "PASSWORD" not in told
    told = _told("--pretrained_model_name_or_path", "m", "--train_shards", " pipe:curl PASSWORD", "--max_train_steps=1")
    assert "'pipe:…' would run a shell command" in told
    assert "PASSWORD" not in told


# --- control characters ----------------------------------------------------------------------------------------------

_CONTROLS = [
    "\x1b[2J",
    "\n12:00:00 INFO all is well",
    "\r",
    "\x00",
    "\x08",
    "\x7f",
    "\x9b2J",
    "\u2028",
    "\u202e",
    "\x85",
]


@pytest.mark.parametrize("flag", [*FLAGS.values()], ids=lambda flag: flag.name)
def test_control_characters_of_a_flag_are_told_and_not_obeyed(flag: Flag) -> None:
    control = _one_of(_CONTROLS, flag)
    is_layout_of_a_prompt = flag.name == "validation_prompt" and control[0] in "\n\r"
    value = f"x{control}y"
    for words in ([f"--{flag.name}", value], [f"--{flag.name}={value}"], [f"--{flag.name}{value}"], [value]):
        told = _told(*words, "--seed=x") if is_layout_of_a_prompt else _told(*words)
        assert told.removesuffix("\n").isprintable()
        assert "all is well" not in told or "\\n12:00:00" in told


@pytest.mark.parametrize("flag", _TEXT_FLAGS, ids=lambda flag: flag.name)
def test_texts_that_no_flag_takes(flag: Flag, tmp_path: pathlib.Path) -> None:
    told = _told(*_BASE, f"--{flag.name}", "a\x1bb")
    assert f"--{flag.name} holds the control character \\x1b at character 2" in told
    told = _told(*_BASE, f"--{flag.name}", os.fsdecode(b"caf\xe9"))
    assert f"--{flag.name} is not UTF-8: the byte 0xe9 stands at character 4" in told
    told = _told(*_BASE, f"--{flag.name}", "a dog \ud83d")
    assert f"--{flag.name} is not UTF-8: half of a surrogate pair stands at character 7" in told
    file = tmp_path / "config.yaml"
    file.write_text(f'{flag.name}: "\\ud83d"', encoding="utf-8")
    assert "is not UTF-8" in _told(*_BASE, "--config", str(file))


@pytest.mark.parametrize(
    "prompt", ["two\nlines", "a\ttab", "a\r\nb", "🐕\u200d🦺", "می\u200cخواهم", "\u200fשלום", "x\u00a0y"]
)
def test_prompts_may_have_lines_and_letters_of_all_scripts(prompt: str) -> None:
    config = parse_command_line([*_BASE, "--validation_prompt", prompt, "--validation_image", "x"], "torch")
    assert config.validation_prompt == (prompt,)


@given(words=st.lists(st.text(), max_size=5))
@example(words=["--" + "\ud83d" * 500])
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_the_words_the_answer_is_printable(words: list[str]) -> None:
    if "--help" not in words and words != ["-h"]:
        told = _told(*words)
        assert told.removesuffix("\n").isprintable()
        told.encode()


@given(content=st.binary(max_size=200) | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(deadline=None)
def test_whatever_the_file_the_answer_is_printable(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        told = _told("--config", file.name, "--seed", "x")
    assert told.removesuffix("\n").isprintable()


@pytest.mark.parametrize(
    "number",
    [
        "1__0",
        "_1",
        "1_",
        "\u0663",
        "\uff11",
        "0x10",
        "1e400000",
        "1" * 400,
        "1" * 5000,
        "9" * 30,
        "--1",
        "+",
        "",
        "1 0",
        "\u00bd",
        "1.5j",
    ],
)
@pytest.mark.parametrize("flag", ["seed", "train_batch_size", "max_train_steps", "process_id"])
def test_whole_numbers_are_written_in_plain_digits(flag: str, number: str) -> None:
    told = _told(*_BASE, f"--{flag}={number}")
    assert f"--{flag} must be a whole number" in told


@pytest.mark.parametrize(
    "number", ["1_0.5", "\u0663.5", "0x1p3", "1" * 500, "1e", "e5", ".", "infinit", "nan1", "1,5", "True"]
)
def test_numbers_are_written_in_plain_digits(number: str) -> None:
    assert "--learning_rate must be a number" in _told(*_BASE, f"--learning_rate={number}")


@pytest.mark.parametrize("number", ["inf", "nan", "-inf", "1e999", "Infinity"])
@pytest.mark.parametrize(
    "flag", [flag.name for flag in FLAGS.values() if flag.kind is float and flag.name != "max_grad_norm"]
)
def test_numbers_without_end_are_refused(flag: str, number: str) -> None:
    assert f"--{flag} must be" in _told(*_BASE, f"--{flag}={number}")
