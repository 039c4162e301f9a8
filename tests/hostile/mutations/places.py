"""What stands in a file's place: nothing, a folder, a pipe, a device, a link that leads out or round in a circle."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from tests.hostile.case import FORGED, Case
from tests.hostile.mutations.binary import mutated_bytes, mutated_safetensors
from tests.hostile.mutations.values import mutated_json, mutated_json_lines, mutated_yaml, pick

_NAMES = (
    f"a\n{FORGED}",
    f"\x1b[31m{FORGED}",
    "\udcff\udc80",
    "n" * 255,
    "-rf",
    "<script>alert(1)<",
    '" onload="alert(1)',
    "checkpoint-٣",
    ".hidden",
    " ",
    "a\\b",
)


def displace(case: Case, path: Path) -> str:
    """Put something else in the place of a file or folder; returns what, in words."""
    name, put = pick(case, _PLACES)
    _clear(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    put(case, path)
    return f"{name} as {path.name}"


def private_file_like(case: Case, path: Path) -> Path:
    """The canary file outside that could pass for this one."""
    for suffixes, name in (
        ((".json", ".jsonl"), "secret.json"),
        ((".yaml", ".yml"), "secret.yaml"),
        ((".csv",), "secret.csv"),
        ((".png", ".jpg", ".jpeg", ".webp"), "private.png"),
    ):
        if path.suffix.lower() in suffixes:
            return case.outside / name
    return case.outside / "secret.txt"


def mutate_file(case: Case, path: Path, extra_keys: tuple[str, ...] = ()) -> str:
    """Something else in the file or in its place; returns what, in words."""
    if case.chance(0.18) or not path.is_file():
        return displace(case, path)
    content = path.read_bytes()
    path.unlink()  # it may be a hard link to the original
    path.write_bytes(_mutated(case, path.name, content, extra_keys))
    return f"{path.name} mutated"


def _mutated(case: Case, name: str, content: bytes, extra_keys: tuple[str, ...]) -> bytes:
    if case.chance(0.12):
        return mutated_bytes(case, content)
    if name.endswith(".jsonl"):
        return mutated_json_lines(case, content, extra_keys)
    if name.endswith(".safetensors"):
        return mutated_safetensors(case, content)
    if name.endswith((".yaml", ".yml")):
        return mutated_yaml(case, content)
    if content[:1] in (b"{", b"["):
        return mutated_json(case, content, extra_keys)
    return mutated_bytes(case, content)


def plant(case: Case, folder: Path) -> str:
    """A file, folder or link that nobody expects, beside what is there."""
    path = folder / pick(case, _NAMES)
    if not os.path.lexists(path):
        displace(case, path)
    return f"planted {ascii(path.name)[:60]}"


def rename(case: Case, path: Path) -> Path:
    """Give a file a name that nobody expects; the new path."""
    target = path.with_name((pick(case, _NAMES) + path.suffix)[-255:])
    if not os.path.lexists(target):
        path.rename(target)
    return target


def files_in(folder: Path) -> list[Path]:
    """Every file, in an order that is always the same."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def copy_tree(source: Path, target: Path) -> Path:
    """A copy of honest files, which share their content with the originals until they are replaced."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _missing(case: Case, path: Path) -> None:
    """Nothing."""


def _full_folder(case: Case, path: Path) -> None:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / path.name).write_text("{}")


def _socket(case: Case, path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is at most some hundred characters long
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name[:90])
    finally:
        os.chdir(here)


def _forbidden(case: Case, path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)


def _sparse(case: Case, path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(64 * 2**30)


def _link_to(target: Callable[[Case, Path], str | Path]) -> Callable[[Case, Path], None]:
    return lambda case, path: path.symlink_to(target(case, path))


_PLACES: tuple[tuple[str, Callable[[Case, Path], None]], ...] = (
    ("nothing", _missing),
    ("nothing", _missing),
    ("an empty file", lambda case, path: path.touch()),
    ("a folder", lambda case, path: path.mkdir()),
    ("a full folder", _full_folder),
    ("a pipe", lambda case, path: os.mkfifo(path)),
    ("a pipe", lambda case, path: os.mkfifo(path)),
    ("a socket", _socket),
    ("a forbidden file", _forbidden),
    ("64 GiB of nothing", _sparse),
    ("a link to a private file", _link_to(private_file_like)),
    ("a link to a private file", _link_to(private_file_like)),
    (
        "a relative link to a private file",
        _link_to(lambda case, path: os.path.relpath(private_file_like(case, path), path.parent)),
    ),
    ("a link to a private folder", _link_to(lambda case, path: case.outside)),
    ("a dangling link", _link_to(lambda case, path: "nowhere")),
    ("a link to itself", _link_to(lambda case, path: path.name)),
    ("a link to its folder", _link_to(lambda case, path: ".")),
    ("a link to /", _link_to(lambda case, path: "/")),
    ("a link to /dev/zero", _link_to(lambda case, path: "/dev/zero")),
    ("a link to /dev/random", _link_to(lambda case, path: "/dev/urandom")),
    ("a link to /dev/stdin", _link_to(lambda case, path: "/dev/stdin")),
    ("a link to /dev/full", _link_to(lambda case, path: "/dev/full")),
    ("a link to /proc/self/mem", _link_to(lambda case, path: "/proc/self/mem")),
)
