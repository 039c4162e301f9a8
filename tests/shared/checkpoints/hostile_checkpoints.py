"""What may have become of a checkpoint's files: builders of hostile edits, for tests and fuzzers.

An edit takes the path of one file (or the checkpoint's folder) and changes what lies there.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import tensorstore
from safetensors.numpy import load_file, save_file

Edit = Callable[[Path], object]
Tensors = dict[str, np.ndarray]

OTHER_VALUES = {
    "null": "null",
    "true": "true",
    "minus one": "-1",
    "a number": "7",
    "a float": "0.5",
    "NaN": "NaN",
    "infinity": "1e999",
    "10**9": "1000000000",
    "10**400": f"1{'0' * 400}",
    "10**5000": f"1{'0' * 5000}",
    "a text": '"text"',
    "half an emoji": '"\\ud83d"',
    "control characters": '"\\u0000\\u001b[2J\\r\\nerror: FORGED"',
    "a list": "[]",
    "a list of null": "[null]",
    "an object": "{}",
    "deep": f"{'[' * 5000}{']' * 5000}",
    "deep for Python": f"{'[' * 300}{']' * 300}",
}
"""JSON that may stand in any value's place."""


def json_edits(content: bytes) -> Iterator[tuple[str, bytes]]:
    """(what was done, the result) for every value of a document replaced by every other, left out, and added to."""
    document = json.loads(content)
    for path, _ in _values(document):
        for name, text in OTHER_VALUES.items():
            yield f"{_called(path)} is {name}", _with(document, path, text).encode()
        if path:
            yield f"{_called(path)} is missing", _without(document, path).encode()
    many = "".join(f', "foreign {number}\\u001b[2J": 1' for number in range(500))
    for path, value in _values(document):
        if isinstance(value, dict) and value:
            text = f"{json.dumps(value)[:-1]}{many}}}"
            yield f"{_called(path)} has foreign keys", _with(document, path, text).encode()


CONTENTS: dict[str, Edit] = {
    "nothing": lambda path: os.truncate(path, 0),
    "a bit": lambda path: os.truncate(path, 5),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "all but the end": lambda path: os.truncate(path, path.stat().st_size - 2),
    "random bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(4096)),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "UTF-16": lambda path: path.write_text("{}", encoding="utf-16"),
    "no UTF-8": lambda path: path.write_bytes(b'{"step": "\xff\xfe"}'),
}
"""A file's content."""


def _in_place(make: Edit) -> Edit:
    def edit(path: Path) -> None:
        path.unlink()
        make(path)

    return edit


IN_PLACE: dict[str, Edit] = {
    "no file": _in_place(lambda path: None),
    "a pipe": _in_place(os.mkfifo),
    "a folder": _in_place(lambda path: path.mkdir()),
    "a link to nothing": _in_place(lambda path: path.symlink_to("nothing")),
    "a link to itself": _in_place(lambda path: path.symlink_to(path.name)),
    "a link to a device": _in_place(lambda path: path.symlink_to("/dev/zero")),
    "a link out": _in_place(lambda path: path.symlink_to("/etc/passwd")),
}
"""In a file's place."""


@contextmanager
def edited(path: Path, edit: Edit) -> Iterator[None]:
    """For as long as the context lasts."""
    before = path.read_bytes()
    edit(path)
    try:
        yield
    finally:
        put_back(path, before)


def put_back(path: Path, content: bytes) -> None:
    """Whatever lies there now."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# --- arrays ----------------------------------------------------------------------------------------------------------


def _on_tensors(change: Callable[[Tensors, str], object]) -> Edit:
    """An edit of a safetensors file by what it does with the first array of some size."""

    def edit(path: Path) -> None:
        tensors = load_file(path)
        change(tensors, next(name for name, value in sorted(tensors.items()) if value.ndim == 1))
        save_file(tensors, path)

    return edit


def _convert(tensors: Tensors, name: str, dtype: str) -> None:
    tensors[name] = tensors[name].astype(dtype)


def _header(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(path: Path) -> None:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return edit


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for name, value in header.items() if name != "__metadata__")


def _sparse(path: Path) -> None:
    """A whole file of 10**12 bytes, which takes no room."""
    tensors = load_file(path)
    name = sorted(tensors)[0]
    size = 4 * 250 * 10**9
    text = json.dumps({name: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + size)


TENSORS: dict[str, Edit] = {
    **{
        f"as {dtype}": _on_tensors(
            lambda tensors, name, dtype=dtype: tensors.update({name: tensors[name].astype(dtype)})
        )
        for dtype in ("float64", "float16", "int64", "int8", "uint8", "bool", "complex64")
    },
    "as bfloat16": _header(lambda header: _first(header).update(dtype="BF16", shape=[_first(header)["shape"][0], 2])),
    "as an unknown type": _header(lambda header: _first(header).update(dtype="F31")),
    "missing": _on_tensors(lambda tensors, name: tensors.pop(name)),
    "all missing": _on_tensors(lambda tensors, name: tensors.clear()),
    "of zero size": _on_tensors(lambda tensors, name: tensors.update({name: np.zeros(0, np.float32)})),
    "of one more": _on_tensors(lambda tensors, name: tensors.update({name: np.append(tensors[name], np.float32(0))})),
    "of more dimensions": _on_tensors(lambda tensors, name: tensors.update({name: tensors[name][None]})),
    "one more": _on_tensors(lambda tensors, name: tensors.update({"foreign\x1b[2J\nerror: FORGED": np.zeros(2)})),
    "an empty name": _on_tensors(lambda tensors, name: tensors.update({"": np.zeros(2, np.float32)})),
    "huge in the header": _header(lambda header: _first(header).update(shape=[10**12])),
    "negative in the header": _header(lambda header: _first(header).update(shape=[-1])),
    "null in the header": _header(lambda header: header.update(foreign=None)),
    "huge offsets": _header(lambda header: _first(header).update(data_offsets=[0, 10**15])),
    "a long header": lambda path: path.write_bytes((10**15).to_bytes(8, "little") + path.read_bytes()[8:]),
    "a deep header": lambda path: path.write_bytes((10**6).to_bytes(8, "little") + b'{"a":' + b"[" * (10**6 - 5)),
    "a terabyte": _sparse,
}
"""Of a safetensors file."""


def database(checkpoint: Path) -> Any:
    """The keys and values of Orbax's arrays."""
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{checkpoint.absolute()}/state/"}}


def _on_keys(change: Callable[[Any], object]) -> Edit:
    def edit(checkpoint: Path) -> None:
        change(tensorstore.KvStore.open(database(checkpoint)).result())

    return edit


def array(name: str, value: np.ndarray, compressor: Any = None) -> Edit:
    """Write an array instead of the one that has this name."""

    def edit(checkpoint: Path) -> None:
        store = tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": database(checkpoint) | {"path": name},
                "metadata": {"compressor": compressor or {"id": "zstd", "level": 1}},
            },
            create=True,
            delete_existing=True,
            dtype=value.dtype,
            shape=value.shape,
        ).result()
        store.write(value).result()

    return edit


def _described(name: str, **changes: Any) -> Edit:
    """Change what the database says of an array, and leave its content."""

    def change(keys: Any) -> None:
        key = f"{name}/.zarray"
        described = json.loads(keys.read(key).result().value) | changes
        keys.write(key, json.dumps(described).encode()).result()

    return _on_keys(change)


def _bomb() -> bytes:
    """Of 2 GiB."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        for _ in range(32):
            stream.write(bytes(2**26))
    return bytes(sink.getvalue())


def orbax_edits(name: str, shape: tuple[int, ...]) -> dict[str, Edit]:
    """Of a checkpoint's folder; `name` is that of one float32 parameter of rank 1."""
    moment, param, dims = f"mu.{name}", f"params.{name}", list(shape)
    edits: dict[str, Edit] = {
        f"{param} as {dtype}": array(param, np.ones(shape, dtype))
        for dtype in ("float64", "float16", "int64", "int8", "bool", "complex64")
    }
    for other in ([10**12], [0], [dims[0] + 1], [*dims, 1], [-1], [], None, "text", [2**63], [1] * 33):
        edits[f"{param} with a shape of {str(other)[:20]}"] = _described(param, shape=other)
    for chunks in ([10**12], [10**9], [0], [-1], [], None, [2**62]):
        edits[f"{param} in pieces of {chunks}"] = _described(param, chunks=chunks)
    return edits | {
        "both huge": _described(param, shape=[10**12], chunks=[10**12]),
        "another compressor": array(param, np.ones(shape, np.float32), {"id": "blosc"}),
        "an unknown compressor": _described(param, compressor={"id": "none such"}),
        "a compressor that is a list": _described(param, compressor=[1]),
        "a filter": _described(param, filters=[{"id": "delta"}]),
        "a structured type": _described(param, dtype=[["a", "<f4"], ["b", "<f4"]]),
        "big-endian": _described(param, dtype=">f4", compressor=7),
        "a missing moment": _on_keys(lambda keys: keys.delete_range(_range(moment)).result()),
        "a missing parameter": _on_keys(lambda keys: keys.delete_range(_range(param)).result()),
        "no arrays": _on_keys(lambda keys: keys.delete_range(tensorstore.KvStore.KeyRange()).result()),
        "a missing piece": _on_keys(lambda keys: keys.write(f"{param}/0", None).result()),
        "a foreign piece": _on_keys(lambda keys: keys.write(f"{param}/0", b"foreign").result()),
        "a bomb": _on_keys(lambda keys: keys.write(f"{param}/0", _bomb()).result()),
        "one more": array("params.foreign\x1b[2J", np.ones(3, np.float32)),
        "a name that is no text": _on_keys(lambda keys: keys.write(b"params.\xff\xfe/.zarray", b"{}").result()),
        "a list for a description": _on_keys(lambda keys: keys.write(f"{param}/.zarray", b"[]").result()),
        "a deep description": _on_keys(lambda keys: keys.write(f"{param}/.zarray", b"[" * 10**6).result()),
        "half of a loss scaler": array("loss_scaler.scale", np.array(2, np.float32)),
        "a step that is none": array("step", np.array([3, 3], np.int32)),
        "a negative step": array("step", np.array(-3, np.int32)),
        "another step": array("step", np.array(4, np.int32)),
    }


def without_moment(name: str) -> Edit:
    """As if the run had never had it."""

    def edit(checkpoint: Path) -> None:
        _on_keys(lambda keys: keys.delete_range(_range(f"mu.{name}")).result())(checkpoint)
        path = checkpoint / "state/_METADATA"
        metadata = json.loads(path.read_text())
        del metadata["tree_metadata"][f"('mu', '{name}')"]
        path.write_text(json.dumps(metadata))

    return edit


def _range(name: str) -> Any:
    return tensorstore.KvStore.KeyRange(f"{name}/", f"{name}0")  # "0" is what follows "/"


# --- JSON ------------------------------------------------------------------------------------------------------------

_MARK = "\x00 a value was here \x00"
_Path = tuple[str | int, ...]


def _values(document: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    yield path, document
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from _values(value, (*path, key))


def _called(path: _Path) -> str:
    return ".".join(map(str, path)) or "everything"


def _with(document: Any, path: _Path, text: str) -> str:
    if not path:
        return text
    copy = json.loads(json.dumps(document))
    _holder(copy, path)[path[-1]] = _MARK
    return json.dumps(copy).replace(json.dumps(_MARK), text)


def _without(document: Any, path: _Path) -> str:
    copy = json.loads(json.dumps(document))
    del _holder(copy, path)[path[-1]]
    return json.dumps(copy)


def _holder(document: Any, path: _Path) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document
