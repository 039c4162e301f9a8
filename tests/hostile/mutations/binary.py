"""Bytes in the place of others: regions overwritten, flipped, cut, doubled, and what pretends to be another format."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable

import numpy as np

from tests.hostile.case import FORGED, Case
from tests.hostile.mutations.values import mutated_json, pick


def mutated_bytes(case: Case, content: bytes) -> bytes:
    """Some region of a file, or all of it, is something else."""
    for _ in range(1 + case.below(2)):
        content = pick(case, _MUTATIONS)(case, content)
    return content


def random_bytes(case: Case, count: int) -> bytes:
    return case.rng.integers(0, 256, count, np.uint8).tobytes()


def _region(case: Case, content: bytes) -> tuple[int, int]:
    """Beginning and end; headers are at the beginning, so that is more likely."""
    if not content:
        return 0, 0
    begin = case.below(min(len(content), 64)) if case.chance(0.4) else case.below(len(content))
    length = pick(case, (1, 1, 2, 4, 8, 16, 64, 512, max(1, len(content) // 3)))
    return begin, min(len(content), begin + length)


def _with(content: bytes, begin: int, end: int, piece: bytes) -> bytes:
    return content[:begin] + piece + content[end:]


def _overwritten(fill: Callable[[Case, int], bytes]) -> Callable[[Case, bytes], bytes]:
    def mutate(case: Case, content: bytes) -> bytes:
        begin, end = _region(case, content)
        return _with(content, begin, end, fill(case, end - begin))

    return mutate


def _flipped(case: Case, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(1 + case.below(8)):
        if changed:
            changed[case.below(len(changed))] ^= 1 << case.below(8)
    return bytes(changed)


def _doubled(case: Case, content: bytes) -> bytes:
    begin, end = _region(case, content)
    return _with(content, begin, begin, content[begin:end])


def _removed(case: Case, content: bytes) -> bytes:
    begin, end = _region(case, content)
    return _with(content, begin, end, b"")


def _inserted(case: Case, content: bytes) -> bytes:
    begin, _ = _region(case, content)
    return _with(content, begin, begin, random_bytes(case, 1 + case.below(64)))


def _large_number(case: Case, content: bytes) -> bytes:
    begin, _ = _region(case, content)
    size = pick(case, (2, 4, 8))
    value = pick(case, (2 ** (8 * size) - 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 0, 10**size))
    order = pick(case, ("little", "big"))
    return _with(content, begin, begin + size, int(value).to_bytes(size, order))


def _another_format(case: Case, content: bytes) -> bytes:
    return pick(
        case,
        (
            lambda: b"",
            lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
            lambda: b"<!DOCTYPE html><html><script>alert(1)</script>",
            lambda: f"{FORGED}\x1b[31m\n{FORGED}\n".encode(),
            lambda: malicious_pickle(case),
            lambda: malicious_torch_zip(case),
            lambda: zip_bomb(),
            lambda: b"\x00" * (1 + case.below(100_000)),
            lambda: b"\xff" * (1 + case.below(100_000)),
            lambda: random_bytes(case, 1 + case.below(100_000)),
            lambda: content[::-1],
        ),
    )()


_MUTATIONS: tuple[Callable[[Case, bytes], bytes], ...] = (
    _overwritten(random_bytes),
    _overwritten(random_bytes),
    _overwritten(lambda case, count: b"\x00" * count),
    _overwritten(lambda case, count: b"\xff" * count),
    _overwritten(lambda case, count: bytes(32 + case.below(90) for _ in range(min(count, 4096)))),
    _flipped,
    _flipped,
    lambda case, content: content[: case.below(len(content) + 1)],
    lambda case, content: content[:-1],
    lambda case, content: content + random_bytes(case, 1 + case.below(4096)),
    lambda case, content: content + b"\x00" * (1 + case.below(100_000)),
    _doubled,
    _removed,
    _inserted,
    _large_number,
    _large_number,
    _another_format,
)


# --- formats that run code or swell ----------------------------------------------------------------------------------


class _MakesAFolder:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (self.path,)


def malicious_pickle(case: Case) -> bytes:
    """Whoever unpickles it makes the folder that says that code was executed."""
    return pickle.dumps(_MakesAFolder(str(case.executed)), protocol=2)


def malicious_torch_zip(case: Case) -> bytes:
    """The same as `torch.save` packs it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", malicious_pickle(case))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()


def zip_bomb() -> bytes:
    """Some ten kB of which 64 MB come, twenty times."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x00" * 64_000_000)
    return file.getvalue()


# --- safetensors -----------------------------------------------------------------------------------------------------


def mutated_safetensors(case: Case, content: bytes) -> bytes:
    """Its header's JSON, its header's length, or any of its bytes are something else."""
    if case.chance(0.4):
        return mutated_bytes(case, content)
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if case.chance(0.75):
        header = _mutated_header(case, header)
    size = (
        len(header)
        if case.chance(0.85)
        else pick(case, (0, 1, max(0, len(header) - 1), 2**31, 2**63, 2**64 - 1, 10**8))
    )
    return size.to_bytes(8, "little") + header + data


def _mutated_header(case: Case, header: bytes) -> bytes:
    if case.chance(0.4):
        return mutated_json(case, header, ("__metadata__", "x"))
    tensors = json.loads(header)
    names = [name for name in tensors if name != "__metadata__"]
    name, other = pick(case, names), pick(case, names)
    entry = tensors[name]
    action = case.below(9)
    if action == 0:
        entry["dtype"] = pick(case, ("F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "C64", "Q9", "U64", "F32\n"))
    elif action == 1:
        entry["shape"] = pick(
            case, ([], [0], [-1], [1] * 70, [2**63], [2**32, 2**32], [10**9, 10**9], entry["shape"][::-1])
        )
    elif action == 2:
        entry["data_offsets"] = pick(
            case, ([0, 0], [0, 2**63], [-1, 4], [8, 4], [0], [], tensors[other]["data_offsets"])
        )
    elif action == 3:
        tensors.pop(name)
    elif action == 4:
        tensors[f"{name}\n{FORGED}\x1b[31m"] = tensors.pop(name)
    elif action == 5:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif action == 6:
        tensors["__metadata__"] = pick(case, ({"format": "tf"}, {"format": "pt" * 10**6}, {}, [], None, {"format": 1}))
    elif action == 7:
        tensors.update(
            {f"extra.{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(50_000)}
        )
    else:
        tensors[""] = tensors.pop(name)
    return json.dumps(tensors).encode()
