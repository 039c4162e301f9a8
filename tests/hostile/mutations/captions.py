"""Captions as files of a shard hold them, and as rows of a list do."""

import json
from collections.abc import Callable

from tests.hostile.case import Case
from tests.hostile.mutations.binary import random_bytes
from tests.hostile.mutations.values import hostile_text, pick, snippet

_FILES: tuple[tuple[str, str, Callable[[Case], bytes]], ...] = (
    ("text that forges", "txt", lambda case: hostile_text(case).encode("utf-8", "surrogatepass")),
    ("text that forges", "txt", lambda case: hostile_text(case).encode("utf-8", "surrogatepass")),
    ("text in UTF-16", "txt", lambda case: "a red circle".encode("utf-16")),
    ("text in Latin-1", "txt", lambda case: "naïve".encode("latin-1")),
    ("text of noise", "txt", lambda case: random_bytes(case, 300)),
    ("no text", "txt", lambda case: b""),
    ("text of 50 MB", "txt", lambda case: b"a red circle " * 4_000_000),
    ("text of 50 MB without a blank", "txt", lambda case: b"x" * 50_000_000),
    ("text of 5 MB of dots", "txt", lambda case: b"." * 5_000_000),
    ("text of 5 MB of signs", "txt", lambda case: "猫".encode() * 1_700_000),
    ("text of 5 MB of blanks", "txt", lambda case: b" " * 5_000_000),
    ("JSON of another type", "json", lambda case: snippet(case).encode("utf-8", "surrogatepass")),
    ("JSON of another type", "json", lambda case: snippet(case).encode("utf-8", "surrogatepass")),
    (
        "JSON of a key of another type",
        "json",
        lambda case: f'{{"caption": {snippet(case)}}}'.encode("utf-8", "surrogatepass"),
    ),
    (
        "JSON of a key of another type",
        "json",
        lambda case: f'{{"text": {snippet(case)}}}'.encode("utf-8", "surrogatepass"),
    ),
    ("JSON without a caption", "json", lambda case: b'{"a": 1}'),
    ("JSON nested deeply", "json", lambda case: b'{"a":' * 50_000),
    ("JSON nested deeply", "json", lambda case: b"[" * 100_000 + b"]" * 100_000),
    ("JSON of half an emoji", "json", lambda case: b'{"caption": "a dog \\ud83d"}'),
    ("JSON of half an emoji", "json", lambda case: b'["a dog \\ud83d", "b"]'),
    ("JSON of many captions", "json", lambda case: json.dumps(["a"] * 10**6).encode()),
    ("JSON of 50 MB", "json", lambda case: b'{"caption": "' + b"x" * 50_000_000 + b'"}'),
    ("JSON that is none", "json", lambda case: b"{caption: a}"),
)


def hostile_caption_file(case: Case) -> tuple[str, str, bytes]:
    """What it is, in words, the ending of its name, and the file."""
    name, ending, make = pick(case, _FILES)
    return name, ending, make(case)
