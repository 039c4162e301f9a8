"""Folders that the datasets library would wait for, follow elsewhere, or fail on in its own words."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from shared.data.preprocessing import decode
from shared.data.sources import open_source
from tests.shared.data.pictures import config, loader, pairs, png

# A stream that is given up in the middle leaves its file to the garbage collector: datasets does not close it.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder, beside one with a CSV that is none of its business."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.csv").write_text("image,conditioning_image,text\na.png,a.png,SECRET\n")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv"])
def test_a_line_that_fits_no_memory_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("shared.data.sources.huggingface._LONGEST_LINE", 2**21)
    with (folder / name).open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(ValueError, match=rf"{name} begins with a line of more than 2 MiB"):
        open_source(config(train_data_dir=str(folder)))


DAMAGED_JSON = [b"null", b"[]", b"", b"\xff", b"[" * 10**5]

FILES = ["data.csv", "README.md", "metadata.jsonl", "prompt.json", "train.parquet", "sub/data.json"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_pipes_are_not_waited_for(folder: Path, name: str, streaming: bool) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=rf"{name} is a named pipe: expected a file"):
        open_source(config(train_data_dir=str(folder), streaming=streaming))


@pytest.mark.parametrize("name", FILES)
def test_lists_do_not_lead_out_of_the_folder(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(folder.parent / "secret" / "a.csv")
    with pytest.raises(ValueError, match=rf"{name} cannot be used: .*which leads to .*secret.*--allowed_data_dirs"):
        open_source(config(train_data_dir=str(folder)))


@pytest.mark.parametrize("pattern", ["{secret}/*.csv", "../secret/a.csv", "file://{secret}/a.csv"])
def test_a_description_names_no_files_elsewhere(folder: Path, pattern: str) -> None:
    where = pattern.format(secret=folder.parent / "secret")
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {where}\n---\n")
    (folder / "b.csv").write_text("image,conditioning_image,text\n")
    with pytest.raises(ValueError, match=r"--allowed_data_dirs|cannot be loaded"):
        open_source(config(train_data_dir=str(folder)))


@pytest.mark.parametrize("name", ["../secret/a.arrow", "{secret}/a.arrow"])
def test_a_saved_dataset_has_its_tables_in_its_folder(folder: Path, name: str) -> None:
    datasets.Dataset.from_list(pairs(2)).save_to_disk(str(folder))
    secret = folder.parent / "secret"
    table = next(folder.glob("*.arrow"))
    table.rename(secret / "a.arrow")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": name.format(secret=secret)}]
    (folder / "state.json").write_text(json.dumps(state))
    saved = {"train_data_dir": str(folder), "load_from_disk": True}
    with pytest.raises(ValueError, match=r"a\.arrow cannot be used: .*--allowed_data_dirs"):
        open_source(config(**saved))
    open_source(config(**saved, allowed_data_dirs=(str(secret),)))


def test_a_saved_dataset_has_its_splits_in_its_folder(folder: Path) -> None:
    datasets.DatasetDict(train=datasets.Dataset.from_list(pairs(2))).save_to_disk(str(folder))
    (folder / "dataset_dict.json").write_text('{"splits": ["../secret"]}')
    with pytest.raises(ValueError, match=r"dataset_dict\.json names the split '\.\./secret'"):
        open_source(config(train_data_dir=str(folder), load_from_disk=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("state.json", content) for content in (b"{}", b'{"_data_files": 3}', b'{"_data_files": [{}]}')),
        *((name, content) for name in ("state.json", "dataset_info.json") for content in DAMAGED_JSON),
    ],
)
def test_a_saved_dataset_with_a_damaged_record_is_named(folder: Path, name: str, content: bytes) -> None:
    datasets.Dataset.from_list(pairs(2)).save_to_disk(str(folder))
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.json|cannot be loaded|cannot be read|is empty|has the columns"):
        usable(config(train_data_dir=str(folder), load_from_disk=True))


def usable(training: Any) -> None:
    """Read all of it; ValueErrors are sentences."""
    loader(training).batch(0)


def test_every_damage_of_a_saved_table_is_a_sentence(folder: Path) -> None:
    datasets.Dataset.from_list(pairs(4)).save_to_disk(str(folder))
    table = next(folder.glob("*.arrow"))
    content = table.read_bytes()
    for where in range(0, len(content), max(1, len(content) // 60)):
        damaged = bytearray(content)
        damaged[where : where + 4] = b"\xff\xff\xff\x7f"
        table.write_bytes(damaged)
        try:
            usable(config(train_data_dir=str(folder), load_from_disk=True))
        except ValueError as error:
            assert str(error).isprintable()  # noqa: PT017


FEATURES = datasets.Features(
    {"image": datasets.Image(), "conditioning_image": datasets.Image(), "text": datasets.Value("string")}
)
TABLES = {
    "train.parquet": lambda path: datasets.Dataset.from_list(pairs(4), features=FEATURES).to_parquet(path),
    "train.csv": lambda path: path.write_text("image,conditioning_image,text\na.png,a.png,a\n" * 3),
    "train.json": lambda path: path.write_text('{"image": "a.png", "conditioning_image": "a.png", "text": "a"}\n' * 3),
    "train.arrow": lambda path: datasets.Dataset.from_list(pairs(4)).to_parquet(path),  # of another format
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves files to the collector
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_damaged_tables_are_named(folder: Path, name: str, streaming: bool) -> None:
    TABLES[name](folder / name)
    content = (folder / name).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\xff" * 500, content[:-20] + b"\0" * 20):
        (folder / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot be|--\w+_column|none of the|more than --max_skipped") as refused:
            usable(config(dataset_name=str(folder), streaming=streaming))
        assert str(refused.value).isprintable()


def test_a_stream_that_breaks_off_is_named(folder: Path) -> None:
    rows = [pair | {"text": "a" * 2000} for pair in pairs(60)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "train.parquet", row_group_size=10, compression="none")
    content = bytearray((folder / "train.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50_000] = b"\xff" * 50_000
    (folder / "train.parquet").write_bytes(content)
    source = open_source(config(dataset_name=str(folder), streaming=True, shuffle_buffer_size=1))
    with pytest.raises(ValueError, match=r"the dataset .*data cannot be read any further \("):
        list(source.iterate(0))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "value", [3, 1.5, True, None, {"a": 1}, [1], {"bytes": None, "path": None}, {"path": 3}, ["a"]]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_other_types_are_skipped(folder: Path, value: Any, streaming: bool, caplog: Any) -> None:
    good = {"bytes": png(0, 8, 8), "path": "a.png"}
    rows = [{"image": value, "conditioning_image": good, "text": "a"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    with pytest.raises(ValueError, match=r"none of the training samples|holds no samples"):
        usable(config(dataset_name=str(folder), streaming=streaming))
    assert "it has no image" in caplog.text


def test_a_format_that_was_saved_with_the_data_is_left_out(folder: Path) -> None:
    """PyTorch's would import it, and make tensors of captions."""
    datasets.Dataset.from_list(pairs(2)).with_format("numpy").save_to_disk(str(folder))
    usable(config(train_data_dir=str(folder), load_from_disk=True, max_skipped_samples=0))


@pytest.mark.parametrize(
    "location",
    ["https://user:SECRET@host.example/data", "s3://key:SECRET@bucket/data", "https://host.example/?token=SECRET"],
)
@pytest.mark.parametrize("saved", [False, True])
def test_an_address_is_refused_without_its_secrets(location: str, saved: bool) -> None:
    given: dict[str, Any] = {"dataset_name": location}
    if saved:
        given = {"train_data_dir": location, "load_from_disk": True}
    with pytest.raises(ValueError, match="cannot be loaded") as refused:
        open_source(config(**given))
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("name", ["a\0b", "\x1b[2J", "x" * 5000, "a/b/c/d", ".", "..", " "])
def test_names_that_are_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for given in ({"dataset_name": name}, {"train_data_dir": f"/nowhere/{name}"}):
        with pytest.raises(ValueError, match=r"cannot be|not a folder|--allowed|column|pipe|splits") as refused:
            open_source(config(**given))
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 1500


def test_a_folder_of_zipped_pictures_is_read(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w") as file:
        for index in range(3):
            file.writestr(f"{index}.png", png(index, 8, 8))
        rows = [{"file_name": f"{i}.png", "text": f"c{i}", "conditioning_image": "x"} for i in range(3)]
        file.writestr("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for streaming in (False, True):
        source = open_source(config(dataset_name=str(folder), streaming=streaming))
        samples = list(source.iterate(0)) if streaming else [source[0]]  # type: ignore[union-attr, index]
        assert isinstance(decode(samples[0].image), PIL.Image.Image)
