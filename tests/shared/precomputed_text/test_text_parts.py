"""A file of encoded texts is whole or not there, and nothing else is taken for one."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from shared.precomputed_text.layout import Layout, StoredDtype
from shared.precomputed_text.parts import KEY_BYTES, TextPart, remove_leftovers, write_part
from shared.user_errors import UserError

PROJECT = Path(__file__).resolve().parents[3]
SHAPES = {"prompt_embeds": (3, 4), "pooled_prompt_embeds": (5,)}
LAYOUT = Layout("F32", SHAPES)
COUNT = 7
KEYS = [bytes([index]) * KEY_BYTES for index in range(COUNT)]


def arrays_of(layout: Layout = LAYOUT) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(COUNT, *shape)).astype(layout.dtype) for name, shape in layout.shapes.items()}


def in_batches(arrays: dict[str, np.ndarray], size: int = 3) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, COUNT, size):
        yield {name: array[start : start + size] for name, array in arrays.items()}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "part.safetensors"
    write_part(path, LAYOUT, KEYS, in_batches(arrays_of()))
    return path


def read(part: TextPart, name: str, layout: Layout = LAYOUT) -> np.ndarray:
    out = np.empty((COUNT, *layout.shapes[name]), layout.dtype)
    for row in reversed(range(COUNT)):
        part.read(name, row, out[row])
    return out


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shapes", [SHAPES, {"prompt_embeds": (2, 3)}])
def test_safetensors_reads_the_same(tmp_path: Path, dtype: StoredDtype, shapes: dict[str, tuple[int, ...]]) -> None:
    layout = Layout(dtype, shapes)
    arrays = arrays_of(layout)
    write_part(tmp_path / "part.safetensors", layout, KEYS, in_batches(arrays))
    part = TextPart(tmp_path / "part.safetensors", layout)
    assert part.keys == KEYS
    assert part.is_whole()
    with safe_open(tmp_path / "part.safetensors", framework="np") as file:
        assert set(file.keys()) == {"keys", *shapes}
        assert file.get_tensor("keys").tobytes() == b"".join(KEYS)
        for name in shapes:
            np.testing.assert_array_equal(read(part, name, layout), arrays[name])
            theirs = file.get_tensor(name)
            assert theirs.dtype == {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
            np.testing.assert_array_equal(theirs.view(layout.dtype), arrays[name])


def test_another_layout_is_not_read(written: Path) -> None:
    for other in (Layout("F16", SHAPES), Layout("F32", SHAPES | {"prompt_embeds": (4, 3)})):
        with pytest.raises(UserError, match="another header than was written"):
            TextPart(written, other)


def damage_of(path: Path) -> str:
    try:
        return "" if TextPart(path, LAYOUT).is_whole() else f"{path} has other content"
    except UserError as error:
        return str(error)


@settings(max_examples=150)
@given(place=st.integers(0, 2000), value=st.integers(0, 255), cut=st.integers(0, 2000) | st.none())
def test_what_is_not_what_was_written_is_found(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, cut: int | None
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "part.safetensors"
    write_part(path, LAYOUT, KEYS, in_batches(arrays_of()))
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    content = content if cut is None else content[: cut % len(content)]
    is_same = content == path.read_bytes()
    path.write_bytes(content)
    damage = damage_of(path)
    assert (damage == "") == is_same
    assert damage == "" or str(path) in damage
    assert len(damage) < 1000


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"__metadata__": {"sha256": "0" * 64}, "keys": {"shape": [2**20, 32]}},
        {"__metadata__": {"sha256": "0" * 64}, "keys": {"shape": [-1, 32]}},
        {"__metadata__": {"sha256": "x"}, "keys": {"shape": [0, 32]}},
        {"__metadata__": {"sha256": "0" * 64}, "keys": {"shape": []}},
    ],
)
def test_a_header_that_others_wrote_promises_nothing(tmp_path: Path, header: dict[str, object]) -> None:
    content = json.dumps(header).encode()
    path = tmp_path / "part.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(UserError, match=path.name):
        TextPart(path, LAYOUT)
    path.write_bytes((2**63).to_bytes(8, "little") + b"[" * 5000)
    with pytest.raises(UserError, match=path.name):
        TextPart(path, LAYOUT)


def test_a_file_that_is_cut_while_it_is_used_is_named(written: Path) -> None:
    part = TextPart(written, LAYOUT)
    os.truncate(written, 700)
    with pytest.raises(UserError, match=r"part\.safetensors ends before its time"):
        read(part, "pooled_prompt_embeds")


def test_a_file_stays_readable_when_its_name_is_gone(written: Path) -> None:
    part = TextPart(written, LAYOUT)
    written.unlink()
    np.testing.assert_array_equal(read(part, "prompt_embeds"), arrays_of()["prompt_embeds"])


def test_a_writer_that_fails_leaves_nothing_and_what_was_there(written: Path) -> None:
    def failing() -> Iterator[dict[str, np.ndarray]]:
        yield next(in_batches(arrays_of()))
        raise OSError(28, "No space left on device")

    before = written.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_part(written, LAYOUT, KEYS, failing())
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_only_leftovers_of_dead_writers_are_removed(written: Path) -> None:
    """A living writer holds the lock of its file, and a young file may be about to be locked."""
    old, young = (written.with_name(f".{name}.safetensors.0.tmp") for name in ("old", "young"))
    for path, moment in ((old, 1000.0), (young, 3000.0)):
        path.touch()
        os.utime(path, (moment, moment))
    seen = []

    def looking() -> Iterator[dict[str, np.ndarray]]:
        remove_leftovers(written.parent, older_than=2000.0)
        own = next(path for path in written.parent.glob(".part*.tmp"))
        os.utime(own, (1000.0, 1000.0))
        remove_leftovers(written.parent, older_than=2000.0)
        seen.extend(sorted(written.parent.glob(".*.tmp")))
        yield arrays_of()

    write_part(written, LAYOUT, KEYS, looking())
    assert len(seen) == 2, "the writer's own and the young one"
    assert young in seen
    assert sorted(written.parent.iterdir()) == [young, written]
    with young.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers(written.parent, older_than=4000.0)
        assert young.exists()
    remove_leftovers(written.parent, older_than=4000.0)
    assert not young.exists()


def test_a_writer_that_is_killed_leaves_nothing_that_is_taken_for_a_file(tmp_path: Path) -> None:
    """As long as it lives its file is not touched; then the next start removes it."""
    code = """
import sys, time
from pathlib import Path
import numpy as np
from shared.precomputed_text.layout import Layout
from shared.precomputed_text.parts import write_part

def encoded():
    yield {"prompt_embeds": np.ones((1, 2, 3), np.float32)}
    print("half", flush=True)
    time.sleep(600)

write_part(Path(sys.argv[1]) / "part.safetensors", Layout("F32", {"prompt_embeds": (2, 3)}), [bytes(32)] * 2, encoded())
"""
    in_an_hour = time.time() + 3600
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "half\n"
            (half,) = tmp_path.iterdir()
            remove_leftovers(tmp_path, older_than=in_an_hour)
            assert half.exists()
        finally:
            writer.kill()
    assert list(tmp_path.glob("*.safetensors")) == []
    remove_leftovers(tmp_path, older_than=in_an_hour)
    assert list(tmp_path.iterdir()) == []
