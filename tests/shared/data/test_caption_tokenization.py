import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.tokenization import tokenizer_function, used_text
from shared.models.source import ModelSource
from shared.models.tokenizer_files import read_tokenizer

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
    ids = tokenizer_function(read_tokenizer(ModelSource(folder, "tokenizer")))(["A red circle", "", "red " * 200])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(
        ids, [[start, *words, end] + [end] * 72, [start] + [end] * 76, [start] + [words[1]] * 75 + [end]]
    )


def test_a_folder_without_tokenizer_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer; expected tokenizer_config\.json with vocab\.json"):
        read_tokenizer(ModelSource(folder))


def test_a_tokenizer_without_its_length_is_named(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="does not say its model_max_length"):
        read_tokenizer(ModelSource(folder, "tokenizer"))


def uncut(tokenizer: Any, captions: list[str]) -> Any:
    """What the library makes of whole captions."""
    return tokenizer(captions, max_length=77, padding="max_length", truncation=True)["input_ids"]


@pytest.fixture(scope="module")
def demo_tokenizer() -> Any:
    return read_tokenizer(ModelSource("shared/demo_model", "tokenizer"))


# Long runs of a few kinds of letters: what is longer than the bound, which is some 5,000 letters for this vocabulary.
TEXTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["a ", "red ", "x", "1", "é", "e\u0301", "\u1112\u1161\u11ab", "日本", "\U0001f642", "\n", "\t  "]
        )
        | st.text(max_size=12),
        st.sampled_from([1, 2, 50, 3000, 20_000]),
    ),
    max_size=6,
).map(lambda parts: "".join(text * count for text, count in parts))


@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_a_long_captions_ids_are_those_of_the_whole(text: str, demo_tokenizer: Any) -> None:
    np.testing.assert_array_equal(tokenizer_function(demo_tokenizer)([text]), uncut(demo_tokenizer, [text]))


def test_the_end_of_a_long_caption_counts_where_the_tokenizer_keeps_it(demo_tokenizer: Any) -> None:
    text = "red " * 5000 + "circle with a blue background"
    try:
        demo_tokenizer.truncation_side = "left"
        tokenize = tokenizer_function(demo_tokenizer)
        np.testing.assert_array_equal(tokenize([text]), uncut(demo_tokenizer, [text]))
        assert used_text(tokenize, text).removesuffix(" […]").endswith("red circle with a blue background")
    finally:
        demo_tokenizer.truncation_side = "right"


@pytest.mark.parametrize("text", ["a dog " * 8_000_000, "a" * 50_000_000, " " * 50_000_000 + "a", "日" * 20_000_000])
def test_a_book_of_a_caption_takes_no_time(text: str, demo_tokenizer: Any) -> None:
    tokenize = tokenizer_function(demo_tokenizer)
    began = time.monotonic()
    assert tokenize([text]).shape == (1, 77)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("text", ["a dog \ud83d", "\udcff"])
def test_half_a_character_is_refused(text: str, demo_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"the caption .* cannot be used: its caption holds half a character"):
        tokenizer_function(demo_tokenizer)([text])


def test_cut_captions_are_said_once_and_counted(demo_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenize = tokenizer_function(demo_tokenizer)
    whole = "a red circle"
    long = "\x1b[2J" + "red " * 100 + "END"
    tokenize([whole, ""])
    tokenize.report()
    assert caplog.text == ""
    tokenize([long, whole])
    tokenize([long])
    (record,) = caplog.records
    assert "more than the 77 tokens" in record.getMessage()
    assert "END" not in record.getMessage()
    assert record.getMessage().isprintable()
    tokenize.report()
    assert "2 of 4 captions and prompts had more than 77 tokens" in caplog.text


class Watched:
    """A tokenizer that refuses to be used by a thread while another uses it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._in_use = tokenizer, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        assert self._in_use.acquire(blocking=False)
        try:
            time.sleep(0.001)
            return self._tokenizer(*given, **named)
        finally:
            self._in_use.release()


def test_threads_take_turns(demo_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenize = tokenizer_function(Watched(demo_tokenizer))
    captions = ["a red circle", "red " * 100]
    with ThreadPoolExecutor(4) as threads:
        rows = list(threads.map(tokenize, [captions] * 40))
        used = list(threads.map(tokenize.used, ["a red circle"] * 40))
    assert used == ["a red circle"] * 40
    for ids in rows:
        np.testing.assert_array_equal(ids, uncut(demo_tokenizer, captions))
    tokenize.report()
    assert "40 of 80 captions and prompts" in caplog.text


def test_the_used_text_is_what_the_tokens_hold(demo_tokenizer: Any) -> None:
    tokenize = tokenizer_function(demo_tokenizer)
    assert used_text(tokenize, "a red circle") == "a red circle"
    used = used_text(tokenize, "red " * 100)
    assert used == "red " * 74 + "red […]"
    shortened = used.removesuffix(" […]")
    np.testing.assert_array_equal(tokenize([shortened]), tokenize(["red " * 100]))
    assert used_text(lambda captions: np.zeros((len(captions), 77), np.int32), "red " * 100) == "red " * 100
