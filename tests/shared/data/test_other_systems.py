"""Data that was made with Windows' or macOS' programs: names, encodings, line ends."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest

from shared.data.batches import BatchSpec
from shared.data.sample import BadSampleError
from shared.data.sources import open_source
from shared.data.sources.named_files import NamedFiles
from tests.shared.data.hostile_data import sample, tar
from tests.shared.data.pictures import captions_in, config, loader, pairs, png, write_image_folder, write_prompt_json

LISTS: dict[str, Callable[..., Path]] = {"prompt.json": write_prompt_json, "metadata.jsonl": write_image_folder}
EXPECTED = ["caption 0", "caption 1", "caption 2"]


def rewritten(folder: Path, name: str, change: Callable[[str], str], encoding: str = "utf-8", end: str = "\n") -> Path:
    """A list whose texts but captions were changed."""
    LISTS[name](folder, pairs(3))
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    rows = [{key: text if "caption" in text else change(text) for key, text in row.items()} for row in rows]
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    (folder / name).write_bytes(text.encode(encoding))
    return folder


def read(folder: Path) -> list[str]:
    loading = loader(config(train_data_dir=str(folder)), BatchSpec(3))
    captions = captions_in(loading.batch(0))
    assert loading.skipped == 0
    return sorted(captions)


@pytest.mark.parametrize("name", LISTS)
def test_backslashes_of_windows_are_slashes(tmp_path: Path, name: str) -> None:
    assert read(rewritten(tmp_path / "data", name, lambda text: text.replace("/", "\\"))) == EXPECTED


@pytest.mark.parametrize("name", LISTS)
def test_a_file_whose_name_holds_a_backslash_is_that_file(tmp_path: Path, name: str) -> None:
    folder = rewritten(tmp_path / "data", name, lambda text: text.replace("/", "\\"))
    for path in sorted(folder.glob("image/*.png")):
        path.rename(folder / f"image\\{path.name}")
    assert read(folder) == EXPECTED


@pytest.mark.parametrize(
    "name", ["..\\secret.png", "image\\..\\..\\secret.png", "..\\data2\\a.png", "linked\\secret.png"]
)
def test_no_reading_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    (folder / "image").mkdir(parents=True)
    (folder / "linked").symlink_to(tmp_path)
    (tmp_path / "data2").mkdir()
    for path in (tmp_path / "secret.png", tmp_path / "data2" / "a.png"):
        path.write_bytes(png(0, 8, 8))
    with pytest.raises(BadSampleError, match=r"outside of the data's folder"):
        NamedFiles("data", folder, []).find(name)
    found = NamedFiles("data", folder, [tmp_path]).find(name)
    assert isinstance(found, Path)
    assert found.is_file()


@pytest.mark.parametrize("name", ["C:\\data\\1.png", "c:/data/1.png", "\\\\server\\share\\1.png"])
def test_files_of_another_machine_are_called_that(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadSampleError, match=r"a file of another machine; expected a name relative|outside of"):
        NamedFiles("data", tmp_path, []).find(name)


def test_a_name_without_a_file_is_the_name_as_it_is(tmp_path: Path) -> None:
    for name in ("a\\b.png", " é.png ", "x" * 5000 + "\\é"):
        assert NamedFiles("data", tmp_path, []).find(name) == tmp_path / name


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("form_of_files", ["NFC", "NFD"])
def test_accents_may_be_composed_or_apart(tmp_path: Path, form: Any, form_of_files: Any) -> None:
    folder = rewritten(tmp_path / "data", "prompt.json", lambda text: normalize(form, text.replace("00", "été")))
    for path in sorted(folder.glob("*image/*.png")):
        path.rename(path.parent / normalize(form_of_files, path.name.replace("00", "été")))
    assert read(folder) == EXPECTED


def test_blanks_around_a_name_are_none_of_it_unless_they_are(tmp_path: Path) -> None:
    folder = rewritten(tmp_path / "data", "prompt.json", lambda text: f" {text} ")
    assert read(folder) == EXPECTED
    shutil.copy(folder / "image" / "0000.png", folder / "0.png ")
    assert NamedFiles("data", folder, []).find("0.png ") == folder / "0.png "


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_lists_are_read_as_windows_writes_them(tmp_path: Path, name: str, encoding: str) -> None:
    """PowerShell's `>` writes UTF-16 with a byte order mark."""
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    folder = rewritten(tmp_path / "data", name, lambda text: text.replace("00", "é\u2028"), encoding, "\r\n")
    (folder / name).write_bytes(mark.encode(encoding) + (folder / name).read_bytes())
    for path in sorted(folder.glob("*image/*.png")):
        path.rename(path.parent / path.name.replace("00", "é\u2028"))
    assert read(folder) == EXPECTED


@pytest.mark.parametrize("name", LISTS)
def test_a_damaged_list_in_utf_16_is_a_sentence(tmp_path: Path, name: str) -> None:
    folder = rewritten(tmp_path / "data", name, str, "utf-16")
    (folder / name).write_bytes((folder / name).read_bytes() + b"\x00\xd8a\x00")
    with pytest.raises(ValueError, match=rf"{name} begins as UTF-16 and is damaged"):
        open_source(config(train_data_dir=str(folder)))


def test_another_encoding_is_told(tmp_path: Path) -> None:
    folder = write_prompt_json(tmp_path / "data", pairs(3))
    text = (folder / "prompt.json").read_text()
    (folder / "prompt.json").write_bytes(text.replace("caption 1", "café").encode("latin-1"))
    bad = open_source(config(train_data_dir=str(folder)))[1]  # type: ignore[index]
    assert bad.defect.startswith("its caption is text in another encoding than UTF-8; expected a text")
    (folder / "prompt.json").write_bytes(text.replace("image/0001", "é/0001").encode("latin-1"))
    bad = open_source(config(train_data_dir=str(folder)))[1]  # type: ignore[index]
    assert bad.defect == "it names text in another encoding than UTF-8; expected the name of a file"


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_one_array_in_place_of_lines_is_told_how_to_mend(tmp_path: Path, indent: int | None, encoding: str) -> None:
    folder = write_prompt_json(tmp_path / "data", pairs(3))
    rows = [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]
    (folder / "prompt.json").write_bytes(json.dumps(rows, indent=indent).encode(encoding))
    with pytest.raises(ValueError, match=r"line 1 begins a JSON array; expected one JSON object per line.*jq -c"):
        open_source(config(train_data_dir=str(folder)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("key", ["txt", "TXT"])
def test_captions_in_tars_are_read_as_windows_writes_them(tmp_path: Path, encoding: str, key: str) -> None:
    content = "un café".encode(encoding)
    (tmp_path / "a.tar").write_bytes(tar(sample("0", content, key)))
    assert open_source(config(train_shards=(str(tmp_path / "a.tar"),)))[0].captions == ("un café",)  # type: ignore[index]


@pytest.mark.parametrize("ending", ["PNG", "Jpg", "JPEG", "jpeg"])
def test_endings_in_capitals_are_endings(tmp_path: Path, ending: str) -> None:
    picture = png(0, 8, 8)
    members = [(f"0.{ending}", picture), (f"0.COND.{ending}", picture), ("0.TXT", b"a dog")]
    (tmp_path / "a.tar").write_bytes(tar(members))
    found = open_source(config(train_shards=(str(tmp_path / "a.tar"),)))[0]  # type: ignore[index]
    assert (found.image, found.conditioning_images, found.captions) == (picture, (picture,), ("a dog",))


def test_what_macos_puts_beside_files_in_tars_is_passed_over(tmp_path: Path) -> None:
    members = [pair for name, content in sample("0") for pair in ((f"._{name}", b"fork"), (name, content))]
    (tmp_path / "a.tar").write_bytes(tar(members))
    source = open_source(config(train_shards=(str(tmp_path / "a.tar"),)))
    assert len(source) == 1  # type: ignore[arg-type]
    source[0].check()  # type: ignore[index]
