"""A checkpoint's digests: whatever has changed since they were written is found, and named."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.checkpoints import digests
from shared.checkpoints.digests import DIGESTS_FILE, Verdict, examine, write_digests
from shared.user_errors import UserError

names = st.sampled_from(["weights", "state.json", "state/d/1a", "state/manifest", "record/metadata", ".hidden", "a b"])
contents = st.dictionaries(names, st.binary(max_size=40), min_size=1)


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_digests(folder)
    return folder


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return written(tmp_path / "checkpoint-4", {"weights": bytes(1000), "state/d/1a": b"moments", "state.json": b"{}"})


@given(contents)
def test_what_was_written_is_whole(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    folder = written(tmp_path_factory.mktemp("runs"), files)
    assert examine(folder) == Verdict(True, ())
    shutil.copytree(folder, folder / "moved")
    assert examine(folder / "moved") == Verdict(True, ()), "its place is no part of it"
    shutil.rmtree(folder / "moved")
    write_digests(folder)
    assert examine(folder) == Verdict(True, ()), "they are not of themselves"


@given(files=contents, data=st.data())
def test_any_flipped_bit_is_found_and_its_file_named(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    folder = written(tmp_path_factory.mktemp("runs"), files)
    sizes = {name: (folder / name).stat().st_size for name in (*files, DIGESTS_FILE)}
    name = data.draw(st.sampled_from([name for name, size in sizes.items() if size > 0]))
    flip(folder / name, data.draw(st.integers(0, sizes[name] * 8 - 1)))
    (damage,) = examine(folder).damage
    assert name in damage


def test_every_bit_of_the_digests_counts(tmp_path: Path) -> None:
    folder = written(tmp_path, {"a": b""})
    for bit in range((folder / DIGESTS_FILE).stat().st_size * 8):
        flip(folder / DIGESTS_FILE, bit)
        (damage,) = examine(folder).damage
        assert DIGESTS_FILE in damage, bit
        flip(folder / DIGESTS_FILE, bit)
    assert not examine(folder).damage


@given(files=contents, data=st.data())
def test_any_other_length_is_found_and_told(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    folder = written(tmp_path_factory.mktemp("runs"), files)
    name = data.draw(st.sampled_from(sorted(files)))
    size = data.draw(st.integers(0, 100).filter(lambda size: size != len(files[name])))
    os.truncate(folder / name, size)
    assert examine(folder).damage == (f"{name} has {size} bytes, of {len(files[name])} that were written",)


def test_files_that_are_gone_or_new_are_named(checkpoint: Path) -> None:
    (checkpoint / "weights").unlink()
    (checkpoint / "state" / "d" / "2b").touch()
    assert examine(checkpoint).damage == ("weights is missing", "state/d/2b was not there when it was saved")


def test_without_digests_nothing_is_known(checkpoint: Path) -> None:
    (checkpoint / DIGESTS_FILE).unlink()
    (checkpoint / "weights").unlink()
    verdict = examine(checkpoint)
    assert verdict == Verdict(False, ())
    assert str(verdict) == "cannot be checked: it has no digests.json"


def test_a_verdict_is_one_line_of_bounded_length(checkpoint: Path) -> None:
    for number in range(50):
        (checkpoint / f"\x1b[2J\nerror: FORGED {number} {'x' * 200}").touch()
    verdict = str(examine(checkpoint))
    assert verdict.isprintable()
    assert len(verdict) < 2000
    assert verdict.endswith("and 47 files more")


def test_a_disk_that_fails_is_damage(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(digests, "_sha256", fail)
    assert "weights cannot be read (Input/output error)" in examine(checkpoint).damage


# --- digests that others wrote ---------------------------------------------------------------------------------------


def rewritten(checkpoint: Path, files: Any, digest: Any = None) -> None:
    """As by somebody who knows how it is done."""
    digest = digests._sha256_of(files) if digest is None else digest
    (checkpoint / DIGESTS_FILE).write_text(json.dumps({"files": files, "sha256": digest}))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "", "state", "a/../weights", "\0", "x" * 5000])
def test_no_name_leads_anywhere(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (checkpoint.parent / "secret").write_text("secret")
    files = json.loads((checkpoint / DIGESTS_FILE).read_text())["files"]
    rewritten(checkpoint, files | {name: {"bytes": 6, "sha256": "0" * 64}})

    def unexpected(path: Path) -> str:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(digests, "_sha256", unexpected)
    (damage,) = examine(checkpoint).damage
    assert damage.endswith(" is missing")
    assert len(damage) < 400


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "null",
            "[]",
            "{}",
            '{"files": {}}',
            '{"files": [], "sha256": ""}',
            '{"files": {"a": null}, "sha256": ""}',
        ),
        *('{"files": {"a": {"bytes": -1, "sha256": ""}}, "sha256": ""}', '{"files": {}, "sha256": "0"}', "[" * 10**5),
        '{"files": {"a": {"bytes": 1e400, "sha256": "' + "0" * 64 + '"}}, "sha256": ""}',
        '{"files": {"a": {"bytes": 1, "sha256": "' + "X" * 64 + '"}}, "sha256": ""}',
        '{"files": {"\\ud800": {"bytes": 1, "sha256": "' + "0" * 64 + '"}}, "sha256": ""}',
    ],
)
def test_digests_that_are_none_are_damage(checkpoint: Path, content: str) -> None:
    (checkpoint / DIGESTS_FILE).write_text(content)
    (damage,) = examine(checkpoint).damage
    assert DIGESTS_FILE in damage
    assert damage.isprintable()
    assert len(damage) < 1000


@pytest.mark.parametrize("kind", ["link", "link in a circle", "folder", "pipe", "huge"])
def test_what_is_no_file_of_digests_is_damage(checkpoint: Path, kind: str) -> None:
    path = checkpoint / DIGESTS_FILE
    moved = path.rename(checkpoint.parent / "elsewhere")
    match kind:
        case "link":
            path.symlink_to(moved)
        case "link in a circle":
            path.symlink_to(path)
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "huge":
            path.touch()
            os.truncate(path, 10**12)
    (damage,) = examine(checkpoint).damage
    assert DIGESTS_FILE in damage


@pytest.mark.parametrize("name", ["weights", "state"])
def test_a_link_out_of_the_checkpoint_is_damage(checkpoint: Path, name: str) -> None:
    moved = (checkpoint / name).rename(checkpoint.parent / "elsewhere")
    (checkpoint / name).symlink_to(moved)
    (damage,) = examine(checkpoint).damage
    assert f"{name} is a link that leads out of its folder" in damage


def test_a_quarter_of_a_terabyte_of_nothing_is_not_read(checkpoint: Path) -> None:
    os.truncate(checkpoint / "weights", 2**40)
    assert examine(checkpoint).damage == ("weights has 1,099,511,627,776 bytes, of 1,000 that were written",)
    files = json.loads((checkpoint / DIGESTS_FILE).read_text())["files"]
    files["weights"]["bytes"] = 2**40
    rewritten(checkpoint, files)
    (damage,) = examine(checkpoint).damage
    assert "1,024 GiB, which no honest checkpoint has" in damage


def test_digests_are_not_written_of_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a named pipe"):
        write_digests(tmp_path)
    assert not (tmp_path / DIGESTS_FILE).exists()
