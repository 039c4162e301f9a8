"""Rows of others, an object per line of JSON: read with bounds, and as they come."""

import codecs
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from shared.data.sample import NoText, is_missing, kind_of
from shared.untrusted import MIB, open_file, shown
from shared.user_errors import UserError

LARGEST_LIST = 1024 * MIB
"""Five million rows of 200 bytes, in a folder of as many files."""

_LONGEST_LINE = 64 * MIB

# Values are left as they are until they are wanted: the rows of others have columns of any size beside these three.
_decode_row = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str | list[str | None] | None).decode

_ARRAY = re.compile(rb"\s*\[\s*(\{|$)")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Text = str | list[str | None] | NoText | None


def read_rows(path: Path, digest: Any = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank; `text_of` takes the objects' values.

    Lists are in UTF-8, or in UTF-16 with its byte order mark, as Windows PowerShell writes them.

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
    """A row's value as a text or a list of texts, some of which may be missing; None where there is none.

    Half a surrogate pair, which JSON can spell, stays: `RawSample.check` refuses it.
    """
    if isinstance(value, msgspec.Raw):
        try:
            return _decode_text(value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            value = _leniently(bytes(value))
    if isinstance(value, str):
        return value
    if is_missing(value):
        return None
    is_list_of_texts = isinstance(value, list) and all(isinstance(item, str) or is_missing(item) for item in value)
    return value if is_list_of_texts else NoText(kind_of(value))


def _chunks(path: Path, digest: Any) -> Iterator[bytes]:
    """What ends with a line feed, and the rest, in UTF-8."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_LIST:
            raise UserError(f"{shown(path)} has more than {LARGEST_LIST / MIB:,.0f} MiB; split the data up")
        for chunk in _lines(path, file):
            if len(chunk) >= _LONGEST_LINE:
                raise UserError(f"{shown(path)} has a line of more than {_LONGEST_LINE / MIB:.0f} MiB")
            if digest is not None:
                digest.update(chunk)
            yield chunk.removeprefix(codecs.BOM_UTF8)


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    beginning = file.read(2)
    file.seek(0)
    if beginning not in _UTF16:
        yield from iter(lambda: file.readline(_LONGEST_LINE), b"")
        return
    try:
        with io.TextIOWrapper(file, "utf-16", newline="\n") as text:
            for line in iter(lambda: text.readline(_LONGEST_LINE), ""):
                yield line.encode("utf-8")
    except UnicodeError as error:
        raise UserError(
            f"{shown(path)} begins as UTF-16 and is damaged ({shown(error)}). Write it again, best in UTF-8."
        ) from None


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return _decode_row(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass  # NaN, which pandas writes for a missing caption; a byte order mark; half a character
    except RecursionError:
        raise _not_json(path, number, "it is nested more deeply than any honest line") from None
    if _ARRAY.match(line):
        raise UserError(
            f"{shown(path)} line {number} begins a JSON array; expected one JSON object per line, which "
            f"`jq -c '.[]' {shown(path.name)} > lines` makes of it"
        )
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        reason = f"its byte {error.start + 1} is no UTF-8; save the list in UTF-8"
        raise _not_json(path, number, reason) from error
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
    except UnicodeDecodeError:
        return NoText("text in another encoding than UTF-8")
    except (ValueError, RecursionError):
        return NoText("no JSON that can be read")
