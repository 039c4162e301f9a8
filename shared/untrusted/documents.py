"""The one place that reads JSON that others wrote: size, depth, encoding, and types held against what is declared."""

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from shared.untrusted.files import MIB, read_file
from shared.untrusted.text import shown
from shared.user_errors import UserError

T = TypeVar("T")

_LARGEST = 64 * MIB  # the index of a model of a hundred thousand tensors has some ten


def read_json(
    path: str | Path, of: type[T] | Any = dict[str, Any], *, fix: str, limit: int = _LARGEST, infinities: bool = False
) -> T:
    """A JSON file as the declared type: a dataclass, a TypedDict, `dict[str, Any]` (any object), `list[str]`, …

    Keys that the type does not declare are passed over. NaN and infinity are no JSON.

    Args:
        infinities: take them all the same, as Python's own writer and reader of JSON do.
        fix: what the user can do about a fault, a sentence at the end of the message.

    Raises:
        UserError: the file cannot be read, is too large, is not JSON, or is not of that type; the message names it.
    """
    content = read_file(path, limit)
    if infinities:
        return convert(_parsed_by_python(content, str(path), fix), of, where=str(path), fix=fix)
    return parse_json(content, of, where=str(path), fix=fix)


def parse_json(content: bytes, of: type[T] | Any = dict[str, Any], *, where: str, fix: str) -> T:
    """`read_json` for content at hand; `where` is what to call it."""
    try:
        return msgspec.json.decode(_as_utf8(content), type=of)
    except msgspec.ValidationError as error:
        raise UserError(f"{shown(where)} holds something else than expected: {shown(error)}. {fix}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{shown(where)} is not JSON ({shown(error)}). {fix}") from error
    except RecursionError as error:
        raise UserError(f"{shown(where)} is nested more deeply than any honest file. {fix}") from error


def convert(values: Any, of: type[T] | Any, *, where: str, fix: str) -> T:
    """Values that were read before, such as a part of a JSON object, as the declared type; raises as `parse_json`."""
    try:
        return msgspec.convert(values, of)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # half a surrogate pair is no text to it
        raise UserError(f"{shown(where)} holds something else than expected: {shown(error)}. {fix}") from error
    except RecursionError as error:
        raise UserError(f"{shown(where)} is nested more deeply than any honest file. {fix}") from error


def _parsed_by_python(content: bytes, where: str, fix: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:  # no JSON, no UTF-8, or an integer of more digits than Python reads
        raise UserError(f"{shown(where)} is not JSON ({shown(error)}). {fix}") from error
    except RecursionError as error:
        raise UserError(f"{shown(where)} is nested more deeply than any honest file. {fix}") from error


def _as_utf8(content: bytes) -> bytes:
    """Windows' editors begin files with a byte order mark, and may write UTF-16."""
    encoding = json.detect_encoding(content)
    return content if encoding == "utf-8" else content.decode(encoding).encode("utf-8")
