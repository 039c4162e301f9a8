"""What a generation leaves in its folder, and what it never touches there."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.generate.output_folder import (
    CONTACT_SHEET,
    RECORD_FILE,
    ContactSheet,
    begin_output,
    check_output_folder,
    write_picture,
    write_record,
)
from shared.user_errors import UserError


def picture(name: str) -> dict[str, str]:
    return {"file": name}


def generate_into(folder: Path, count: int) -> None:
    names = [f"{number:03}.png" for number in range(count)]
    check_output_folder(folder)
    begin_output(folder, {}, list(map(picture, names)))
    for name in names:
        write_picture(folder / name, np.zeros((8, 8, 3), np.uint8), {})


def test_an_earlier_generation_is_replaced_as_a_whole(tmp_path: Path) -> None:
    generate_into(tmp_path / "new", 3)
    generate_into(tmp_path / "new", 1)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["000.png", RECORD_FILE]


@pytest.mark.parametrize("name", ["holiday.jpg", "000.png", "config.yaml", ".hidden"])
def test_a_folder_of_other_files_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="not of an earlier generation"):
        check_output_folder(tmp_path)
    (tmp_path / name).unlink()
    generate_into(tmp_path, 1)
    if name != "000.png":
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=name):
            check_output_folder(tmp_path)


def test_a_record_of_others_cannot_have_files_deleted(tmp_path: Path) -> None:
    folder, victim = tmp_path / "pictures", tmp_path / "victim.txt"
    folder.mkdir()
    victim.write_text("mine")
    (folder / "notes.txt").write_text("mine")
    listed = [picture("../victim.txt"), picture(str(victim)), picture("notes.txt")]
    (folder / RECORD_FILE).write_text(json.dumps({"generated_by": "x", "pictures": listed}))
    with pytest.raises(ValueError, match=r"notes\.txt"):
        check_output_folder(folder)
    begin_output(folder, {}, [])
    assert victim.exists()
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"pictures": 3}', "null"])
def test_a_record_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / RECORD_FILE).write_text(content)
    with pytest.raises(ValueError, match="Delete it, or choose another --output_dir"):
        check_output_folder(tmp_path)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made: File exists"):
        check_output_folder(tmp_path / "file")


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sheet = ContactSheet(pictures_per_row=1, channels=(3,))
    sheet.add(0, "a prompt", "000.png", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(os, "open", full)  # which every file that is written whole begins with
    for write in (
        lambda: write_picture(tmp_path / "000.png", np.zeros((8, 8, 3), np.uint8), {}),
        lambda: write_record(tmp_path, {}, [], finished=True),
        lambda: sheet.write(tmp_path),
    ):
        with pytest.raises(UserError, match="free some space"):
            write()


def test_texts_are_in_the_picture(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    write_picture(tmp_path / "0.png", image, {"prompt": "rot, grün\n🔴"})
    with Image.open(tmp_path / "0.png") as read:
        assert read.text == {"prompt": "rot, grün\n🔴"}  # type: ignore[attr-defined]
        np.testing.assert_array_equal(np.asarray(read), image)


def test_a_sheet_of_very_many_pictures_stays_small(tmp_path: Path) -> None:
    image = np.zeros((600, 300, 3), np.uint8)
    sheet = ContactSheet(pictures_per_row=40, channels=(3,))
    for number in range(120):
        sheet.add(number, "a prompt", "", image, image)
    sheet.write(tmp_path)
    with Image.open(tmp_path / CONTACT_SHEET) as read:
        assert 9 * 128 < read.width < 2500  # a condition and eight pictures
        assert 3 * 256 < read.height < 1200
