"""Files appear whole or not at all, with the usual permissions, in place of a planted link."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.outgoing.atomic_files import remove_unfinished_files, write_atomically, write_text_atomically


def test_a_planted_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "config.yaml"
    victim.write_text("precious")
    path.symlink_to(victim)
    write_text_atomically(path, "new")
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    assert path.read_text() == "new"


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_the_usual_ones_or_the_owner_s_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text_atomically(tmp_path / "usual", "")
        write_text_atomically(tmp_path / "private", "", private=True)
    finally:
        os.umask(before)
    assert (tmp_path / "usual").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names: list[str] = []
    write_atomically(tmp_path / "weights.safetensors", lambda temporary: names.append(temporary.name))
    (tmp_path / names[0]).write_text("half")
    others = ["weights.safetensors", ".lock", ".mine.tmp", "a.0123abcd.tmp", ".a.0123abcg.tmp", ".a.0123abcd.tmp.gz"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".folder.0123abcd.tmp").mkdir()
    remove_unfinished_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".folder.0123abcd.tmp"}
    remove_unfinished_files(tmp_path / "nowhere")


def test_what_safetensors_left_in_a_killed_process_is_removed(tmp_path: Path) -> None:
    """It writes beside the place that it is told, by a name of its own."""
    program = """
import os, sys, threading
import numpy as np
from safetensors.numpy import save_file

arrays = {"large": np.zeros(2**26, np.float32)}
threading.Thread(target=save_file, args=(arrays, os.path.join(sys.argv[1], "weights"))).start()
while not os.listdir(sys.argv[1]):
    pass
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
    (left,) = tmp_path.iterdir()
    assert left.name != "weights", "it was to be killed before it is complete"
    remove_unfinished_files(tmp_path)
    assert not list(tmp_path.iterdir())
