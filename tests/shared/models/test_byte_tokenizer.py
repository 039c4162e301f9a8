"""The byte tokenizer, read by transformers' CLIPTokenizer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shared.data.tokenization import tokenizer_function
from shared.models.byte_tokenizer import VOCABULARY_SIZE, write_byte_tokenizer
from shared.models.source import ModelSource
from shared.models.tokenizer_files import read_tokenizer

START, END = 512, 513
words = st.lists(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=9), max_size=6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "not" / "there" / "yet"
    write_byte_tokenizer(folder)
    return read_tokenizer(ModelSource(folder))


def ids_of_words(sentence: list[str]) -> list[int]:
    """Byte b alone and at the end of a word, by the order of GPT-2's byte alphabet, as in OpenAI's vocabulary."""
    order = {byte: index for index, byte in enumerate(bytes_to_unicode())}
    return [
        order[byte] + (256 if position == len(word.encode()) - 1 else 0)
        for word in sentence
        for position, byte in enumerate(word.encode())
    ]


def test_the_vocabulary_is_the_first_512_tokens_of_openais_and_the_two_marks(tokenizer: CLIPTokenizer) -> None:
    alphabet = list(bytes_to_unicode().values())
    expected = [*alphabet, *(f"{character}</w>" for character in alphabet), "<|startoftext|>", "<|endoftext|>"]
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__) == expected
    assert len(tokenizer) == VOCABULARY_SIZE
    assert tokenizer("a")["input_ids"] == [START, 320, END]  # "a</w>" is 320 in openai/clip-vit-large-patch14 too
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (START, END, END)


@given(words)
def test_words_become_their_bytes(tokenizer: CLIPTokenizer, sentence: list[str]) -> None:
    assert tokenizer(" ".join(sentence))["input_ids"] == [START, *ids_of_words(sentence), END]


@given(words)
def test_what_was_said_reads_back(tokenizer: CLIPTokenizer, sentence: list[str]) -> None:
    ids = tokenizer(" ".join(sentence))["input_ids"]
    assert str(tokenizer.decode(ids, skip_special_tokens=True)).strip() == " ".join(sentence)


@given(st.text(max_size=40))
def test_any_caption_has_ids_of_the_vocabulary_and_77_of_them(tokenizer: CLIPTokenizer, caption: str) -> None:
    (ids,) = tokenizer_function(tokenizer)([caption])
    assert ids.shape == (77,)
    assert ids.dtype == np.int32
    assert ids[0] == START
    assert END in ids
    assert 0 <= ids.min() <= ids.max() < VOCABULARY_SIZE


def test_text_outside_ascii_is_its_utf8_bytes(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer("é猫")["input_ids"] == [START, *ids_of_words(["é猫"]), END]


def test_long_captions_are_cut_with_the_end_kept(tokenizer: CLIPTokenizer) -> None:
    (ids,) = tokenizer_function(tokenizer)(["x" * 500])
    assert ids[-1] == END
    assert (ids[1:-1] == ids_of_words(["xx"])[0]).all()
