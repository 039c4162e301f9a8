"""The smallest CLIP tokenizer: every byte is a token, alone or at the end of a word. For models made from scratch."""

import json
from pathlib import Path

_START, _END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_SIZE = 514  # 256 bytes, 256 bytes that end a word, start and end of text


def _byte_characters() -> list[str]:
    """The printable characters that stand for the 256 bytes in CLIP's (GPT-2's) byte-level vocabularies.

    Reference: Radford et al. 2019, `bytes_to_unicode`: printable bytes stand for themselves, others for 256, 257, ...
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def write_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer that transformers' `CLIPTokenizer.from_pretrained` loads; captions become at most 77 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = _byte_characters()
    tokens = [*characters, *(f"{character}</w>" for character in characters), _START, _END]
    assert len(tokens) == VOCABULARY_SIZE
    vocabulary = {token: index for index, token in enumerate(tokens)}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": _END,
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
