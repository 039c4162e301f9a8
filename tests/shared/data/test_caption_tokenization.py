import json
from pathlib import Path

import numpy as np
import pytest

from shared.data.tokenization import load_tokenizer, tokenizer_function

WORDS = ["a", "red", "circle"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer in CLIP's own files, whose vocabulary is three words spelled out."""
    letters = sorted(set("".join(WORDS)))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = [pieces[0] + pieces[1]]
            tokens.append(pieces[0])
    vocabulary = {
        token: index for index, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])
    }
    files = tmp_path / "model" / "tokenizer"
    files.mkdir(parents=True)
    (files / "vocab.json").write_text(json.dumps(vocabulary))
    (files / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    specials = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = {"model_max_length": 77, "unk_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"} | specials
    (files / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "model"


def test_captions_become_padded_truncated_int32_rows(folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    words = [vocabulary[f"{word}</w>"] for word in WORDS]
    ids = tokenizer_function(load_tokenizer(str(folder), "tokenizer"))(["A red circle", "", "red " * 200])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(
        ids, [[start, *words, end] + [end] * 72, [start] + [end] * 76, [start] + [words[1]] * 75 + [end]]
    )


def test_a_folder_without_tokenizer_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer; expected tokenizer_config\.json with vocab\.json"):
        load_tokenizer(str(folder))


def test_a_tokenizer_without_its_length_is_named(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="does not say its model_max_length"):
        load_tokenizer(str(folder), "tokenizer")
