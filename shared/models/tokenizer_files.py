"""A CLIP tokenizer from its files, which are read here within bounds: the library gets checked copies of what it needs.

`tokenizer_config.json` may name other files, and code, for the library to open; of its keys only those that say how to
tokenise are handed on.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
from transformers import CLIPTokenizer

from shared.models.configs import CLIPTextConfig
from shared.models.source import ModelSource, shown_name
from shared.untrusted import MIB, foreign_library, parse_json, read_file, shown
from shared.untrusted.border import reason
from shared.user_errors import UserError

_SETTINGS = "tokenizer_config.json"
_FILES = {  # and the most bytes of each: CLIP's largest, tokenizer.json, has 2 MB
    _SETTINGS: MIB,
    "vocab.json": 16 * MIB,
    "merges.txt": 16 * MIB,
    "tokenizer.json": 32 * MIB,
    "special_tokens_map.json": MIB,
    "added_tokens.json": 16 * MIB,
}
_OBJECT = dict[str, Any]
_IDS = dict[str, Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]]
_TYPES: dict[str, Any] = {"vocab.json": _IDS, "added_tokens.json": _IDS}
_KEPT_SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "added_tokens_decoder",
    "additional_special_tokens",
    "bos_token",
    "clean_up_tokenization_spaces",
    "cls_token",
    "do_lower_case",
    "eos_token",
    "errors",
    "extra_special_tokens",
    "mask_token",
    "model_max_length",
    "pad_token",
    "pad_token_type_id",
    "padding_side",
    "sep_token",
    "split_special_tokens",
    "truncation_side",
    "unk_token",
)
_LONGEST = 4096  # transformers says 10**30 when the tokenizer's own length is not on file
# An ordinary caption, an empty one, and every kind of byte that UTF-8 has.
_TRIAL = ("a photo", "", "".join(map(chr, range(1, 0x250))), "\u65e5\u672c\u8a9e \U0001f642")


def read_tokenizer(source: ModelSource) -> CLIPTokenizer:
    """A CLIP tokenizer from its files, seen to work.

    Raises:
        UserError: when there is no complete tokenizer there, or it cannot be read or used.
    """
    where = source.name
    fix = f"expected tokenizer_config.json with vocab.json and merges.txt (or tokenizer.json) in {where}"
    source = source.pinned(_SETTINGS)
    files = {name: path for name in _FILES if (path := source.optional_file(name)) is not None}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files.keys():
        raise UserError(f"{where} holds no tokenizer; {fix}. Point --tokenizer_name or the base model at such a folder")
    contents = {name: read_file(file, _FILES[name]) for name, file in files.items()}
    for name in contents:
        if name.endswith(".json"):
            parse_json(contents[name], _TYPES.get(name, _OBJECT), where=str(files[name]), fix=f"Copy it again; {fix}.")
    contents[_SETTINGS] = _checked_settings(contents.get(_SETTINGS, b"{}"), where, fix)
    with _tokenizer_library(f"no tokenizer could be loaded from {where}", fix):
        tokenizer = _loaded(contents)
    _try_out(tokenizer, where, fix)
    return tokenizer


def check_tokenizer_fits(tokenizer: CLIPTokenizer, name: str, text_encoder: CLIPTextConfig) -> None:
    """Raises UserError where a tokenizer makes more of a caption than the text encoder has embeddings for.

    Args:
        name: what the user calls the tokenizer.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= text_encoder.vocab_size:
        raise UserError(
            f"The tokenizer of {shown_name(name)} has token ids up to {largest}, and the base model's text encoder "
            f"knows those below {text_encoder.vocab_size} (vocab_size in its config.json). Use the tokenizer that "
            "the text encoder was trained with."
        )
    longest = text_encoder.max_position_embeddings
    if tokenizer.model_max_length > longest:
        raise UserError(
            f"The tokenizer of {shown_name(name)} has model_max_length {tokenizer.model_max_length}, and the base "
            f"model's text encoder takes at most {longest} tokens (max_position_embeddings in its config.json). "
            "Correct tokenizer_config.json."
        )


def _checked_settings(content: bytes, where: str, fix: str) -> bytes:
    """What of `tokenizer_config.json` says how to tokenise; the rest names files, code and templates."""
    settings: dict[str, Any] = parse_json(content, where=f"{where}/{_SETTINGS}", fix=f"{fix}.")
    length = settings.get("model_max_length")
    if length is None or (isinstance(length, int | float) and length > _LONGEST):
        raise UserError(f"the tokenizer in {where} does not say its model_max_length; {fix}")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UserError(
            f"the tokenizer in {where} has model_max_length {shown(repr(length))}; expected a whole number from 1 to "
            f"{_LONGEST}, which is 77 for CLIP. Correct its {_SETTINGS}"
        )
    return json.dumps({name: settings[name] for name in _KEPT_SETTINGS if name in settings}).encode()


def _loaded(contents: dict[str, bytes]) -> CLIPTokenizer:
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        for name, content in contents.items():
            Path(folder, name).write_bytes(content)
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _try_out(tokenizer: CLIPTokenizer, where: str, fix: str) -> None:
    """A tokenizer may load and fail at the first caption, or at the first with an unusual letter."""
    with _tokenizer_library(f"the tokenizer in {where} fails at a caption", fix):
        length = tokenizer.model_max_length
        rows = tokenizer(list(_TRIAL), max_length=length, padding="max_length", truncation=True)["input_ids"]
        sound = all(len(row) == length and all(0 <= token < 2**31 for token in row) for row in rows)
    if not sound:
        raise UserError(
            f"the tokenizer in {where} makes something else of a caption than {length} tokens, its model_max_length; "
            f"{fix}"
        )


@contextmanager
def _tokenizer_library(what: str, fix: str) -> Iterator[None]:
    """`foreign_library` for a library whose Rust part may panic, which is no `Exception` in Python."""
    try:
        with foreign_library(what, f"{fix[:1].upper()}{fix[1:]}."):
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({reason(error)}). {fix[:1].upper()}{fix[1:]}.") from error
