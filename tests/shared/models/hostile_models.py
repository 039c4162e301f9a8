"""What can be wrong with a model's folder: edits of honest files, each the path of a file and what becomes of it."""

import copy
import json
import os
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save, save_file

Edit = Callable[[Path], object]

HUGE = 70 * 2**30  # bytes, sparse

OTHER_VALUES: dict[str, str] = {
    "null": "null",
    "true": "true",
    "false": "false",
    "zero": "0",
    "minus one": "-1",
    "half": "0.5",
    "a billion": "1000000000",
    "beyond 64 bits": "1" + 400 * "0",
    "beyond any number": "1" + 5000 * "0",
    "beyond floats": "1e999",
    "NaN": "NaN",
    "infinity": "Infinity",
    "empty text": '""',
    "number as text": '"8"',
    "escapes": r'"\u001b[2J\u0000\nerror: forged"',
    "half an emoji": r'"a dog \ud83d"',
    "long text": json.dumps(100_000 * "x"),
    "another folder": '"/etc/../another/folder"',
    "empty list": "[]",
    "list of one": "[1]",
    "list of texts": '["a", "b"]',
    "list of zeros": "[0, 0]",
    "long list": json.dumps(100_000 * [1]),
    "nested": 50 * "[" + 50 * "]",
    "object": '{"a": 1}',
}
"""JSON in the place of a key's value."""

OTHER_DOCUMENTS: dict[str, bytes] = {
    **{f"document: {name}": text.encode("utf-8", "surrogatepass") for name, text in OTHER_VALUES.items()},
    "empty object": b"{}",
    "key of escapes": rb'{"\u001b[2J\n": 1}',
    "truncated": b'{"in_channels": ',
    "deep": 100_000 * b"[",
    "deep object": 50_000 * b'{"a":' + b"1" + 50_000 * b"}",
    "latin-1": '{"é": 1}'.encode("latin-1"),
    "twice": b'{"a": 1}{"a": 2}',
}


def _in_place_of(make: Edit) -> Edit:
    def edit(path: Path) -> None:
        path.unlink()
        make(path)

    return edit


OTHER_FILES: dict[str, Edit] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "random bytes": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "a pipe": _in_place_of(os.mkfifo),
    "a folder": _in_place_of(Path.mkdir),
    "a device": _in_place_of(lambda path: path.symlink_to("/dev/zero")),
    "missing": lambda path: path.unlink(),
    "a dangling link": _in_place_of(lambda path: path.symlink_to("nowhere")),
    "a circle of links": _in_place_of(lambda path: path.symlink_to(path.name)),
    "huge": lambda path: os.truncate(path, HUGE),
    "a Git LFS pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 3438167540\n"),
}
"""Of any kind of file."""

OTHER_DOCUMENT_FILES = {name: edit for name, edit in OTHER_FILES.items() if name != "without its last byte"}
"""Of a text, whose last byte ends a line."""


def write(content: bytes) -> Edit:
    return lambda path: path.write_bytes(content)


def key_edits(path: Path) -> Iterator[tuple[str, Edit]]:
    """Every key of a JSON object to every other value, every key missing, and keys that nobody knows."""
    original = json.loads(path.read_text(encoding="utf-8"))
    for key in original:
        rest = {name: value for name, value in original.items() if name != key}
        yield f"without {key}", write(json.dumps(rest).encode())
        yield from _values(key, rest)
    for key in ("quantization_config", "auto_map", "_class_name", "_name_or_path", "dtype", "torch_dtype", "new\x1b\n"):
        yield from _values(key, original)


def _values(key: str, rest: dict[str, Any]) -> Iterator[tuple[str, Edit]]:
    others = json.dumps(rest)[1:-1]
    for name, value in OTHER_VALUES.items():
        text = f"{{{others}{', ' if others else ''}{json.dumps(key)}: {value}}}"
        yield f"{key} is {name}", write(text.encode("utf-8"))


# --- weights ---------------------------------------------------------------------------------------------------------


def _changed(change: Callable[[dict[str, np.ndarray], str], object]) -> Edit:
    """An edit of the first tensor, by name, of a safetensors file."""

    def edit(path: Path) -> None:
        tensors = load_file(path)
        change(tensors, min(tensors))
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def _header(change: Callable[[dict[str, Any], str], object]) -> Edit:
    """An edit of what the header says of the first tensor."""

    def edit(path: Path) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header, min(name for name in header if name != "__metadata__"))
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return edit


def _of_dtype(dtype: str) -> Edit:
    return _changed(lambda tensors, name: tensors.update({name: tensors[name].astype(dtype)}))


def _sparse_tensor(path: Path) -> None:
    """One more tensor, of 60 GiB that take no room on the disk."""
    size = 60 * 2**30
    header = json.dumps({"extra": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)


SAFETENSORS: dict[str, Edit] = {
    **{f"values of {dtype}": _of_dtype(dtype) for dtype in ("bool", "int8", "uint8", "int64", "complex64")},
    "one missing": _changed(lambda tensors, name: tensors.pop(name)),
    "one more": _changed(lambda tensors, name: tensors.update({"extra": np.zeros(3, np.float32)})),
    "a name of escapes": _changed(lambda tensors, name: tensors.update({"\x1b[2J\nerror: ": np.zeros(3, np.float32)})),
    "a name of a million letters": _changed(lambda tensors, name: tensors.update({10**6 * "x": tensors[name]})),
    "no tensors": lambda path: path.write_bytes(save({})),
    "a scalar": _changed(lambda tensors, name: tensors.update({name: np.zeros((), np.float32)})),
    "one row less": _changed(lambda tensors, name: tensors.update({name: tensors[name][1:].copy()})),
    "one axis more": _changed(lambda tensors, name: tensors.update({name: tensors[name][None]})),
    "header: float8": _header(lambda header, name: header[name].update(dtype="F8_E4M3")),
    "header: no dtype": _header(lambda header, name: header[name].update(dtype="X32")),
    "header: dtype null": _header(lambda header, name: header[name].update(dtype=None)),
    "header: negative shape": _header(lambda header, name: header[name].update(shape=[-1])),
    "header: huge shape": _header(lambda header, name: header[name].update(shape=[2**62, 2**62])),
    "header: offsets beyond": _header(lambda header, name: header[name].update(data_offsets=[0, 2**40])),
    "header: offsets turned": _header(lambda header, name: header[name].update(data_offsets=[8, 0])),
    "header: a list": lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"),
    "header: too long": lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
    "a tensor of 60 GiB": _sparse_tensor,
}

HARMLESS_SAFETENSORS: dict[str, Edit] = {
    "NaN": _changed(lambda tensors, name: tensors.update({name: tensors[name] * np.float32("nan")})),
    "values of float64": _changed(lambda tensors, name: tensors.update({name: tensors[name].astype(np.float64)})),
}


def pickled(make: Callable[[dict[str, Any]], Any], **options: Any) -> Edit:
    """In a .safetensors file's place, a .bin with what is made of its tensors."""

    def edit(path: Path) -> None:
        import torch

        tensors = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
        stem = "pytorch_model" if path.stem == "model" else path.stem
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates what old files hold
            torch.save(make(tensors), path.with_name(f"{stem}.bin"), **options)
        path.unlink()

    return edit


class _Touches:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickle_edits(executed: Path) -> dict[str, Edit]:
    """`executed` is the file that appears when code of a pickle runs."""
    import torch

    def first(tensors: dict[str, Any], change: Callable[[Any], Any]) -> dict[Any, Any]:
        name = min(tensors)
        return tensors | {name: change(tensors[name])}

    def raw(content: bytes) -> Edit:
        def edit(path: Path) -> None:
            stem = "pytorch_model" if path.stem == "model" else path.stem
            path.with_name(f"{stem}.bin").write_bytes(content)
            path.unlink()

        return edit

    return {
        "code": pickled(lambda tensors: {"a": _Touches(executed)}),
        "code, old format": pickled(lambda tensors: {"a": _Touches(executed)}, _use_new_zipfile_serialization=False),
        "plain pickle of code": raw(pickle.dumps(_Touches(executed))),
        "plain pickle": raw(pickle.dumps({"a": 1})),
        "empty": raw(b""),
        "random": raw(random.Random(1).randbytes(3000)),
        "a damaged archive": raw(b"PK\x03\x04" + bytes(300)),
        "a list": pickled(lambda tensors: list(tensors.values())),
        "null": pickled(lambda tensors: None),
        "nested": pickled(lambda tensors: {"state_dict": tensors}),
        "numbers": pickled(lambda tensors: first(tensors, lambda tensor: 1.0)),
        "numbers for names": pickled(lambda tensors: {1: torch.zeros(2)} | tensors),
        "sparse": pickled(lambda tensors: first(tensors, lambda tensor: tensor.to_sparse())),
        "quantised": pickled(
            lambda tensors: first(tensors, lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8))
        ),
        "bool": pickled(lambda tensors: first(tensors, lambda tensor: tensor > 0)),
        "expanded to a terabyte": pickled(
            lambda tensors: tensors | {"extra": torch.zeros(1).expand(2**20, 2**20)}
        ),
    }  # fmt: skip


# --- indexes of shards -----------------------------------------------------------------------------------------------


def index_edits() -> Iterator[tuple[str, Edit]]:
    """A weight file replaced by an index of shards, with something wrong in it."""
    documents: dict[str, Any] = {
        "a list": [],
        "null": None,
        "a text": "/etc/passwd",
        "empty": {},
        "no shards": {"weight_map": {}},
        "weight_map a list": {"weight_map": ["a"]},
        "weight_map null": {"weight_map": None},
        "numbers for files": {"weight_map": {"a": 1}},
        "null for a file": {"weight_map": {"a": None}},
        "lists for files": {"weight_map": {"a": ["b"]}},
        "missing": {"weight_map": {"a": "missing.safetensors"}},
    } | {
        f"shard {name!r}": {"weight_map": {"a": name}}
        for name in ("../unet/x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "\0", "config.json",
                     "a\x1b\n.safetensors", 5000 * "x" + ".safetensors", "https://example.org/a.safetensors")
    }  # fmt: skip
    for name, document in documents.items():
        yield name, _as_index(json.dumps(document).encode())
    for name, content in OTHER_DOCUMENTS.items():
        yield name, _as_index(content)


def _as_index(content: bytes) -> Edit:
    def edit(path: Path) -> None:
        path.with_name(f"{path.name}.index.json").write_bytes(content)

    return edit


# --- tokenizers ------------------------------------------------------------------------------------------------------


def merges_edits() -> dict[str, Edit]:
    return {
        "no pairs": write(b"#version: 0.2\na\nb\n"),
        "triples": write(b"#version: 0.2\na b c\n"),
        "unknown tokens": write("#version: 0.2\nq\u0101 \u0102z\n".encode()),
        "no UTF-8": write(b"#version: 0.2\n\xff \xfe\n"),
        "blanks": write(b"\n \n  \n"),
        "NUL": write(b"#version: 0.2\n\0 \0\n"),
    }


def vocabulary_edits(path: Path) -> dict[str, Edit]:
    vocabulary = json.loads(path.read_text(encoding="utf-8"))

    def changed(change: Callable[[dict[str, Any]], object]) -> Edit:
        other = copy.deepcopy(vocabulary)
        change(other)
        return write(json.dumps(other).encode())

    return {
        "ids as texts": changed(lambda v: v.update({"a": "1"})),
        "negative id": changed(lambda v: v.update({"a": -1})),
        "fraction": changed(lambda v: v.update({"a": 0.5})),
        "null id": changed(lambda v: v.update({"a": None})),
        "id of a billion": changed(lambda v: v.update({"a": 10**9})),
        "id of 2**32": changed(lambda v: v.update({"a": 2**32})),
        "id of 10**30": changed(lambda v: v.update({"a": 10**30})),
        "no end": changed(lambda v: v.pop("<|endoftext|>")),
        "no start": changed(lambda v: v.pop("<|startoftext|>")),
        "one word": write(b'{"a": 0}'),
    }


ADDED_TOKENS: dict[str, bytes] = {
    "a list": b"[]",
    "ids as texts": b'{"x": "1"}',
    "null": b'{"x": null}',
    "negative": b'{"x": -5}',
    "a text": b'"x"',
}
