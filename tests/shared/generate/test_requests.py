"""Which pictures are asked for."""

from pathlib import Path

import pytest

from shared.generate.options import GenerateConfig
from shared.generate.requests import Request, pair, prompts_of


def test_pictures_of_a_pair_have_numbers_that_follow_each_other() -> None:
    assert pair(["a", "b"], 2, 2) == [Request(0, "a", 0), Request(1, "a", 0), Request(2, "b", 1), Request(3, "b", 1)]
    assert pair(["a"], 3, 1) == [Request(0, "a", 0), Request(1, "a", 1), Request(2, "a", 2)]
    assert pair(["a", "b"], 1, 1) == [Request(0, "a", 0), Request(1, "b", 0)]
    assert Request(7, "a", 0).file_name == "007.png"
    with pytest.raises(ValueError, match="2 prompts and 3 condition images"):
        pair(["a", "b"], 3, 1)


def test_a_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red circle\n\n  grün  \n", encoding="utf-8")
    assert prompts_of(GenerateConfig(prompt_file=str(path))) == ["a red circle", "grün"]
    path.write_text("a red circle\r\ngrün", encoding="utf-16")  # with its byte order mark, as PowerShell writes it
    assert prompts_of(GenerateConfig(prompt_file=str(path))) == ["a red circle", "grün"]
    path.write_bytes(b"\xfcber")
    with pytest.raises(ValueError, match="not UTF-8 at byte 0"):
        prompts_of(GenerateConfig(prompt_file=str(path)))
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        prompts_of(GenerateConfig(prompt_file=str(path)))
    with pytest.raises(ValueError, match="nowhere"):
        prompts_of(GenerateConfig(prompt_file=str(tmp_path / "nowhere")))
