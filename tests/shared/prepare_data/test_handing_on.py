"""What models work at is handed on, word for word: `cache` to the backend that is there, the rest to PyTorch."""

import importlib.util
import os
import sys
from typing import Any

import pytest

from shared.prepare_data.command import main

PACKAGES = {"flax": "jax", "torch": "torch"}


class Replaced(Exception):
    """The process is another program's now."""


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    started: list[list[str]] = []

    def execv(program: str, words: list[str]) -> None:
        assert program == words[0] == sys.executable
        started.append(words[1:])
        raise Replaced

    monkeypatch.setattr(os, "execv", execv)
    return started


def install(monkeypatch: pytest.MonkeyPatch, *backends: str) -> None:
    there = {PACKAGES[backend] for backend in backends}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in there else None)


@pytest.mark.parametrize(
    ("installed", "words", "backend"),
    [
        (("flax", "torch"), [], "flax"),
        (("torch",), [], "torch"),
        (("flax", "torch"), ["--backend", "torch"], "torch"),
        (("flax", "torch"), ["--backend=torch"], "torch"),
        (("flax", "torch"), ["--backend", "torch", "--backend", "flax"], "flax"),
    ],
)
def test_the_backend_is_the_one_named_or_the_one_there(
    monkeypatch: pytest.MonkeyPatch,
    programs: list[list[str]],
    installed: tuple[str, ...],
    words: list[str],
    backend: str,
) -> None:
    install(monkeypatch, *installed)
    with pytest.raises(Replaced):
        main(["cache", "--seed", "3", *words, "--resolution=64"])
    assert programs == [["-m", f"{backend}_trainer.cache_data", "--seed", "3", "--resolution=64"]]


@pytest.mark.parametrize(
    ("installed", "words", "said"),
    [
        ((), [], "cache needs its packages: pip install"),
        (("torch",), ["--backend", "flax"], "--backend flax needs its packages"),
        (("flax",), ["--backend", "jax"], "--backend is 'jax': expected flax or torch"),
        (("flax",), ["--backend"], "--backend is '': expected flax or torch"),
    ],
)
def test_a_backend_that_is_not_there_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    programs: list[Any],
    installed: tuple[str, ...],
    words: list[str],
    said: str,
) -> None:
    install(monkeypatch, *installed)
    assert main(["cache", *words]) == 2
    assert said in capsys.readouterr().err
    assert programs == []


HANDED_ON = (
    ["annotate", "--generated_circles", "4", "--condition", "depth", "--output_dir", "X"],
    ["caption", "--generated_circles=4", "--output_dir", "X"],
)


@pytest.mark.parametrize("words", HANDED_ON)
def test_models_run_in_pytorch(monkeypatch: pytest.MonkeyPatch, programs: list[list[str]], words: list[str]) -> None:
    install(monkeypatch, "flax", "torch")
    with pytest.raises(Replaced):
        main(words)
    assert programs == [["-m", "torch_trainer.prepare_data", *words]]


@pytest.mark.parametrize("words", HANDED_ON)
def test_without_pytorch_models_are_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], programs: list[Any], words: list[str]
) -> None:
    install(monkeypatch, "flax")
    assert main(words) == 2
    assert "run in PyTorch, which is not installed. Run: pip install torch" in capsys.readouterr().err
    assert main([*words, "--batch_size", "0"]) == 2
    assert "--batch_size must be in the range" in capsys.readouterr().err
    assert programs == []
