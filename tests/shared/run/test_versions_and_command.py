"""What a report says of how a run came about: versions of packages, and the command that started it."""

import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.run.result import command_line, package_versions


def test_versions_are_those_that_are_installed() -> None:
    found = package_versions(["numpy", "no-such-package-at-all"])
    assert found == {"python": sys.version.split()[0], "numpy": version("numpy")}


@pytest.mark.parametrize("words", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"], ["--hub_token==hf_secret"]])
@pytest.mark.parametrize("after", [[], ["--seed", "3"]])
def test_the_command_line_hides_the_token(monkeypatch: pytest.MonkeyPatch, words: list[str], after: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train_flax.py", "--push_to_hub", *words, *after])
    shown = command_line()
    assert "hf_secret" not in shown
    kept = shlex.split(shown)
    assert kept[:3] == ["python3", "train_flax.py", "--push_to_hub"]
    assert kept[3].startswith("--hub_token")
    assert kept[3 + len(words) :] == after


def test_the_command_line_can_be_pasted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["train_flax.py", "--validation_prompt", "a red circle; it's $HOME", "--output_dir", "a b"]
    monkeypatch.setattr(sys, "argv", words)
    shown = subprocess.run(
        ["bash", "-c", command_line().replace("python3", "printf '%s\\n'", 1)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines() == words


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("https://user:SECRET@host.example/a-{00..09}.tar", "https://host.example/a-{00..09}.tar"),
        ("https://host.example/a.tar?signature=SECRET&x=SECRET", "https://host.example/a.tar"),
        ("https://host.example/a.tar#SECRET", "https://host.example/a.tar"),
        ("pipe:curl -H 'Authorization: SECRET' https://host.example/a.tar", "pipe:curl …"),
        ("PIPE:curl SECRET", "pipe:curl …"),
        ("pipe:TOKEN=SECRET curl https://host.example/a.tar", "pipe: …"),
        ("data/train-{000..099}.tar", "data/train-{000..099}.tar"),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_the_command_line_hides_what_addresses_hold_of_secrets(
    monkeypatch: pytest.MonkeyPatch, word: str, shown: str, joined: bool
) -> None:
    words = [f"--train_shards={word}"] if joined else ["--train_shards", "a.tar", word]
    monkeypatch.setattr(sys, "argv", ["train_flax.py", *words, "--seed", "3"])
    line = command_line()
    assert "SECRET" not in line
    kept = shlex.split(line)
    assert kept[-2:] == ["--seed", "3"]
    flag, _, value = kept[2].partition("=") if joined else (kept[2], "", kept[4])
    assert flag == "--train_shards"
    assert value.startswith(shown) if "…" in shown else value == shown


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=":")), max_size=5))
def test_words_without_addresses_stay_as_they_are(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_flax.py", *words])
        assert shlex.split(command_line()) == ["python3", "train_flax.py", *words]


def test_a_command_that_ends_in_the_flag_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_flax.py", "--hub_token"])
    assert command_line() == "python3 train_flax.py --hub_token"
