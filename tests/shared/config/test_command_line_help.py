"""What --help shows."""

import re
from typing import get_args

import pytest

from shared.config import Backend, parse_command_line
from shared.config.flags import Flag
from shared.config.options import FLAGS


def _help(capsys: pytest.CaptureFixture[str], backend: Backend, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_command_line(argv or ["--help"], backend)
    assert stop.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("backend", get_args(Backend))
@pytest.mark.parametrize("columns", [80, 120])
def test_it_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int, backend: Backend
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = _help(capsys, backend)
    assert text.startswith(f"usage: train_{backend}.py ")
    assert max(len(line) for line in text.splitlines()) <= columns


def test_every_flag_stands_there_once_underscored(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys, "flax")
    listed = re.findall(r"^  --(\S+)", text, flags=re.MULTILINE)
    assert listed == ["help", "config", "print_config", *FLAGS]
    assert not re.search(r"--\w+-\w", text)


def test_every_group_has_one_heading(capsys: pytest.CaptureFixture[str]) -> None:
    headings = re.findall(r"^([a-z ]+):$", _help(capsys, "flax"), flags=re.MULTILINE)
    groups = ["model", "data", "training", "optimizer", "validation", "checkpoints", "logging and hub"]
    assert headings == ["commands", *groups, "performance", "profiling"]


def test_an_entry_tells_the_type_the_meaning_and_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = re.sub(r"\n {6}", " ", _help(capsys, "flax"))
    assert "  --validation_prompt TEXT [TEXT ...] The prompts" in text
    assert "One of no, fp16, bf16. (Default: not set.)" in text
    text = re.sub(r"\n {6}", " ", _help(capsys, "torch"))
    assert "(Default: everything.) all_but_products is not supported yet by the PyTorch backend." in text
    assert "  --train_batch_size INT The number of images per device" in text
    assert "in pixels: images are resized to it, then cropped at the centre. (Default: 512.)" in text


def test_what_a_backend_lacks_is_said_in_its_own_help_only(capsys: pytest.CaptureFixture[str]) -> None:
    for backend, other in (("flax", "PyTorch"), ("torch", "Flax")):
        text = re.sub(r"\s+", " ", _help(capsys, backend))
        assert "ot supported yet by the" in text
        assert f"supported yet by the {other}" not in text


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["--unknown", "--help"]])
def test_help_is_given_however_it_is_asked_for(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert _help(capsys, "flax", *argv).startswith("usage:")


@pytest.mark.parametrize("flag", FLAGS.values(), ids=FLAGS)
def test_every_meaning_is_a_sentence(flag: Flag) -> None:
    assert re.fullmatch(r"[A-Z].*\.", flag.help)
