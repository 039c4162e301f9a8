"""Files of others are opened within bounds, JSON is held against declared types, whatever is wrong is a sentence."""

import json
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.untrusted import MIB, check_plain_files, foreign_library, is_inside, parse_json, read_file, read_json, shown
from shared.untrusted.documents import convert


@dataclass(frozen=True)
class Declared:
    count: Annotated[int, msgspec.Meta(ge=1, le=100)]
    name: str = ""
    widths: tuple[int, ...] = ()


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.text(st.characters()))
def test_what_is_shown_is_one_printable_line_of_bounded_length(text: str) -> None:
    line = shown(text, limit=60)
    assert line.isprintable()
    assert len(line) <= 61 * len("\\U0010ffff")
    line.encode("utf-8")


@given(st.text(st.characters(exclude_categories=("C", "Z")), max_size=60))
def test_honest_text_is_shown_as_it_is(text: str) -> None:
    assert all(unicodedata.category(letter)[0] not in "CZ" for letter in text)
    assert shown(text, limit=60) == text


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[31mb", "a\rb", "a\u202eb", "a\ud83db", "a\x00b", "a\u2028b"])
def test_control_characters_are_escaped(text: str) -> None:
    assert shown(text) == "a" + text[1].encode("unicode_escape").decode() + text[2:]


def _make_pipe(path: Path) -> None:
    os.mkfifo(path)


def _make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_make_pipe, "is a named pipe: expected a file"),
        (Path.mkdir, "is a folder: expected a file"),
        (_make_loop, "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device: expected a file"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, make: Any, said: str) -> None:
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(ValueError, match=said) as caught:
        read_file(path, MIB)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_impossible_paths_are_a_sentence(path: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_file(path, MIB)
    assert not is_inside(path + "\0", ["."])


def test_a_file_may_be_as_large_as_the_bound_and_no_larger(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    assert read_file(path, 100) == b"x" * 100
    check_plain_files([path, tmp_path / "missing"], 100)
    for read in (read_file, lambda path, limit: check_plain_files([path], limit)):
        with pytest.raises(ValueError, match="more than"):
            read(path, 99)


def test_links_and_dots_do_not_lead_out(tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "secret.png").touch()
    (folder / "inner.png").touch()
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "linked").symlink_to(outside)
    (folder / "itself").symlink_to(folder / "inner.png")
    for name in ("link.png", "linked/secret.png", "../outside/secret.png", str(outside / "secret.png")):
        assert not is_inside(folder / name, [folder]), name
        assert is_inside(folder / name, [folder, outside]), name
    for name in ("inner.png", "itself", "./inner.png", "no/such.png"):
        assert is_inside(folder / name, [folder]), name


@given(JSON_VALUES)
def test_any_json_is_the_declared_type_or_a_sentence(value: Any) -> None:
    said = ""
    try:
        read = parse_json(json.dumps(value).encode(), Declared, where="config.json", fix="Copy it again.")
        assert 1 <= read.count <= 100
    except ValueError as error:
        said = str(error)
    assert said == "" or (said.startswith("config.json ") and said.endswith(" Copy it again."))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[1]",
        b'"text"',
        b"NaN",
        b"[" * 100_000,
        b'{"count":' * 100_000,
        b'{"count": true}',
        b'{"count": "3"}',
        b'{"count": 0}',
        b'{"count": 1e400}',
        b'{"count": ' + b"1" * 400 + b"}",
        b'{"count": 1, "widths": [1, null]}',
        b'{"count": 1, "name": "a dog \\ud83d"}',
        b'{"count": 1, "name": "\xff"}',
        b"\xff\xfe\x00",
        b'{"name": "no count"}',
    ],
)
def test_json_that_is_not_what_was_declared_is_a_sentence(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^a\.json .* Fix it\.$"):
        parse_json(content, Declared, where="a.json", fix="Fix it.")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_files_of_windows_editors_are_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"count": 3, "name": "ü", "more": [{}]}', encoding=encoding)
    assert read_json(path, Declared, fix="") == Declared(3, "ü")


def test_values_read_before_are_converted_alike() -> None:
    assert convert({"count": 3, "widths": [1, 2]}, Declared, where="x", fix="") == Declared(3, widths=(1, 2))
    with pytest.raises(ValueError, match=r"x holds something else than expected: .*\$\.count.* Mend it"):
        convert({"count": None}, Declared, where="x", fix="Mend it.")


def test_a_library_s_error_becomes_a_sentence_and_lack_of_memory_does_not() -> None:
    def ending_in(error: BaseException) -> None:
        with foreign_library("model cannot be loaded", "Copy it."):
            raise error

    with pytest.raises(ValueError, match=r"^model cannot be loaded \(KeyError: 'a\\nb'\)\. Copy it\.$"):
        ending_in(KeyError("a\nb"))
    for error in (MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            ending_in(error)
