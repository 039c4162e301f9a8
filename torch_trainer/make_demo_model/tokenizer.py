"""A CLIP tokenizer whose vocabulary has every word of the demo's captions, so that a caption is seven tokens or so.

Any other text still works: it falls into shorter pieces, down to bytes.
Reference: Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword Units" (algorithm 1).
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from shared.data.sources.colour_names import READABLE_NAMES
from shared.models.byte_tokenizer import write_byte_tokenizer

_WORD_END = "</w>"
_SPECIAL_TOKENS = 2  # start and end of text, the vocabulary's last


def caption_words() -> set[str]:
    """Every word that a circle's caption may hold."""
    return {word for phrase in (*READABLE_NAMES, "circle with background") for word in phrase.split()}


def write_word_tokenizer(folder: Path, words: Iterable[str]) -> None:
    """Write a tokenizer for `CLIPTokenizer.from_pretrained`.

    Args:
        words: lower-case ASCII letters; each becomes one token.
    """
    write_byte_tokenizer(folder)
    vocabulary_path = folder / "vocab.json"
    byte_tokens = list(json.loads(vocabulary_path.read_text(encoding="utf-8")))
    merges = _byte_pair_merges(words)
    merged = [first + second for first, second in merges]
    tokens = [*byte_tokens[:-_SPECIAL_TOKENS], *dict.fromkeys(merged), *byte_tokens[-_SPECIAL_TOKENS:]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    vocabulary_path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _byte_pair_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs to merge, in order, until every word is one token; the most frequent pair goes first."""
    pieces = {word: [*word[:-1], word[-1] + _WORD_END] for word in sorted(set(words))}
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in pieces.values()):
        pairs = Counter(pair for parts in pieces.values() for pair in itertools.pairwise(parts))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merge(parts, best) for word, parts in pieces.items()}
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    index = 0
    while index < len(parts):
        if tuple(parts[index : index + 2]) == pair:
            merged.append(parts[index] + parts[index + 1])
            index += 2
        else:
            merged.append(parts[index])
            index += 1
    return merged
