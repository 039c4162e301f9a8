"""Rows of others, an object per line of JSON: read with bounds, and as they come."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from shared.untrusted import MIB, open_file, shown
from shared.user_errors import UserError

LARGEST_LIST = 1024 * MIB
"""Five million rows of 200 bytes, in a folder of as many files."""

_LONGEST_LINE = 64 * MIB

# Values are left as they are until they are wanted: the rows of others have columns of any size beside these three.
_decode_row = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str | list[str]).decode

Text = str | list[str] | None


def read_rows(path: Path, digest: Any = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank; `text_of` takes the objects' values.

    Args:
        path: the list.
        digest: a hash that is to see what is read.

    Raises:
        UserError: the file cannot be read or is too large, or a line is not an object.
    """
    number = 0
    for chunk in _chunks(path, digest):
        for line in chunk.splitlines():
            number += 1
            if line.strip():
                yield number, _row(path, number, line)


def text_of(value: Any) -> Text:
    """A row's value as a text or a list of texts; anything else counts as nothing.

    Half a surrogate pair, which JSON can spell, stays: `RawSample.check` refuses it.
    """
    if isinstance(value, msgspec.Raw):
        try:
            return _decode_text(value)
        except msgspec.ValidationError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            value = _leniently(bytes(value))
    if isinstance(value, str):
        return value
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def _chunks(path: Path, digest: Any) -> Iterator[bytes]:
    """What ends with a line feed, and the rest."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_LIST:
            raise UserError(f"{shown(path)} has more than {LARGEST_LIST / MIB:,.0f} MiB; split the data up")
        while chunk := file.readline(_LONGEST_LINE):
            if len(chunk) == _LONGEST_LINE:
                raise UserError(f"{shown(path)} has a line of more than {_LONGEST_LINE / MIB:.0f} MiB")
            if digest is not None:
                digest.update(chunk)
            yield chunk


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return _decode_row(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass  # NaN, which pandas writes for a missing caption; a byte order mark; half a character
    except RecursionError:
        raise _not_json(path, number, "it is nested more deeply than any honest line") from None
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _not_json(path, number, shown(error)) from error
    except RecursionError:
        raise _not_json(path, number, "it is nested more deeply than any honest line") from None
    if not isinstance(row, dict):
        raise UserError(f"{shown(path)} line {number} is {line[:40]!r}; expected a JSON object")
    return row


def _not_json(path: Path, number: int, reason: str) -> UserError:
    return UserError(f"{shown(path)} line {number} is not JSON ({reason}); expected one JSON object per line")


def _leniently(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
