"""Rows and captions that others wrote: where they may lead, and what they may hold."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest

from shared.data.sample import MOST_CAPTIONS, BadSampleError, RawSample, captions_of
from shared.data.sources import RandomAccessSource, json_lines, open_source
from shared.data.sources.named_files import NamedFiles
from tests.shared.data.pictures import config, loader, pairs, png, write_image_folder, write_prompt_json


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def reason(sample: RawSample) -> str:
    """Why a sample cannot be used; empty where it can."""
    try:
        sample.check()
    except BadSampleError as error:
        return str(error)
    return ""


# Files outside of the data's folder


def image_folder(folder: Path, name: Any) -> Any:
    write_image_folder(folder, pairs(2))
    return changed(folder / "metadata.jsonl", image_file_name=name)


def prompt_json(folder: Path, name: Any) -> Any:
    write_prompt_json(folder, pairs(2))
    return changed(folder / "prompt.json", source=name)


def changed(path: Path, **values: Any) -> Any:
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | values), *rest]) + "\n")
    return config(train_data_dir=str(path.parent))


def csv(folder: Path, name: Any) -> Any:
    files = write_image_folder(folder.parent / "files", pairs(2))  # beside pictures, datasets passes over a CSV
    folder.mkdir(exist_ok=True)
    good = str(files / "image" / "0001.png")
    (folder / "rows.csv").write_text(f"image,conditioning_image,text\n{name},{good},a\n{good},{good},b\n")
    return config(dataset_name=str(folder), allowed_data_dirs=(str(files),))


def parquet(folder: Path, name: Any) -> Any:
    folder.mkdir(exist_ok=True)
    good = {"bytes": png(0, 8, 8), "path": "good.png"}
    rows = [
        {"image": {"bytes": None, "path": name}, "conditioning_image": good, "text": "a"},
        {"image": good, "conditioning_image": good, "text": "b"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    return config(dataset_name=str(folder))


def streamed_parquet(folder: Path, name: Any) -> Any:
    return config(**vars(parquet(folder, name)) | {"streaming": True, "shuffle_buffer_size": 1})


LAYOUTS: dict[str, Callable[[Path, Any], Any]] = {
    "metadata.jsonl": image_folder,
    "prompt.json": prompt_json,
    "CSV": csv,
    "parquet": parquet,
    "streamed parquet": streamed_parquet,
}


def names(folder: Path, secret: Path) -> dict[str, str]:
    """Ways to name a picture outside of a folder."""
    return {
        "absolute": str(secret),
        "upwards": f"../{secret.name}",
        "down and upwards": f"image/../../{secret.name}",
        "an address": f"file://{secret}",
        "another address": f"LOCAL://{secret}",
        "a link": "link.png",
        "a link to a folder": f"linked/{secret.name}",
        "the folder's namesake": f"../{folder.name}2/a.png",
    }


@pytest.fixture
def outside(tmp_path: Path) -> tuple[Path, Path]:
    """(an empty data folder, a picture beside it), with links in the folder that lead out."""
    folder, secret = tmp_path / "data", tmp_path / "secret.png"
    secret.write_bytes(png(9, 8, 8))
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2" / "a.png").write_bytes(png(9, 8, 8))
    folder.mkdir()
    return folder, secret


def plant_links(folder: Path, secret: Path) -> None:
    (folder / "link.png").symlink_to(secret)
    (folder / "linked").symlink_to(secret.parent)


@pytest.mark.parametrize("layout", ["metadata.jsonl", "prompt.json", "parquet"])
@pytest.mark.parametrize("way", names(Path("a"), Path("b")))
def test_rows_do_not_lead_out_of_the_folder(outside: tuple[Path, Path], layout: str, way: str) -> None:
    folder, secret = outside
    training = LAYOUTS[layout](folder, names(folder, secret)[way])
    source = open_source(training)
    plant_links(folder, secret)
    assert isinstance(source, RandomAccessSource)
    bad, good = source[0], source[1]
    told = reason(bad)
    assert (
        f"outside of the data's folder {folder}. If you trust the data, add --allowed_data_dirs {folder.parent}" in told
    )
    assert names(folder, secret)[way] in told
    assert reason(good) == ""
    (folder / "link.png").unlink()
    (folder / "linked").unlink()
    allowed = open_source(config(**vars(training) | {"allowed_data_dirs": (str(folder.parent),)}))
    plant_links(folder, secret)
    assert reason(allowed[0]) == ""  # type: ignore[index]
    loader(training, source=allowed).batch(0)


@pytest.mark.parametrize("layout", ["CSV", "streamed parquet"])
@pytest.mark.parametrize("way", ["absolute", "upwards", "an address"])
def test_rows_of_other_builders_do_not_either(outside: tuple[Path, Path], layout: str, way: str, caplog: Any) -> None:
    folder, secret = outside
    loading = loader(LAYOUTS[layout](folder, names(folder, secret)[way]))
    loading.batch(0)
    assert loading.skipped == 1
    assert f"outside of the data's folder {folder}. If you trust the data, add --allowed_data_dirs" in caplog.text


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["/dev/zero", "file:///dev/zero", "a\0b.png", "x" * 5000, "loop.png", "..", "\ud83d.png"]
)
def test_names_that_are_none_are_skipped(tmp_path: Path, layout: str, name: str, caplog: Any) -> None:
    if layout not in ("metadata.jsonl", "prompt.json") and not name.isprintable():
        name = "/dev/urandom"  # tables have no such text
    folder = tmp_path / "data"
    folder.mkdir()
    training = LAYOUTS[layout](folder, name)
    source = open_source(training)
    (folder / "loop.png").symlink_to("loop.png")
    loading = loader(training, source=source)
    loading.batch(0)
    assert loading.skipped == 1
    assert caplog.text.count("skipped ") == 1


def test_links_within_the_folder_and_a_linked_folder_are_followed(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "data", pairs(2))
    (tmp_path / "data" / "image").rename(tmp_path / "data" / "elsewhere")
    (tmp_path / "data" / "image").symlink_to("elsewhere")
    (tmp_path / "link").symlink_to("data")
    loading = loader(config(train_data_dir=str(tmp_path / "link")))
    loading.batch(0)
    assert loading.skipped == 0


def test_a_list_may_name_files_beside_its_folder_in_the_data(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "data", pairs(2))
    (tmp_path / "data" / "train").mkdir()
    text = (tmp_path / "data" / "metadata.jsonl").read_text().replace('"image/', '"../image/')
    text = text.replace('"conditioning_image/', '"../conditioning_image/')
    (tmp_path / "data" / "metadata.jsonl").unlink()
    (tmp_path / "data" / "train" / "metadata.jsonl").write_text(text)
    loading = loader(config(train_data_dir=str(tmp_path / "data")))
    loading.batch(0)
    assert loading.skipped == 0


def test_a_snapshot_in_the_hubs_cache_has_its_files_in_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "datasets--a--b" / "blobs"
    blobs.mkdir()
    write_image_folder(tmp_path / "files", pairs(2))
    for path in (tmp_path / "files").rglob("*.*"):
        inside = snapshot / path.relative_to(tmp_path / "files")
        inside.parent.mkdir(exist_ok=True)
        path.rename(blobs / f"{path.parent.name}-{path.name}")
        inside.symlink_to(blobs / f"{path.parent.name}-{path.name}")
    loading = loader(config(train_data_dir=str(snapshot)))
    loading.batch(0)
    assert loading.skipped == 0


@pytest.mark.parametrize(
    ("name", "layout"), [("metadata.jsonl", write_image_folder), ("prompt.json", write_prompt_json)]
)
def test_a_list_that_leads_out_is_an_error(tmp_path: Path, name: str, layout: Any) -> None:
    folder = layout(tmp_path / "data", pairs(2))
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{name} cannot be used: .*which leads to .*elsewhere.*--allowed_data_dirs"):
        open_source(config(train_data_dir=str(folder)))
    open_source(config(train_data_dir=str(folder), allowed_data_dirs=(str(tmp_path),)))


@pytest.mark.parametrize("name", ["absent", "file", "a\0b", ""])
def test_allowed_folders_exist(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    given = str(tmp_path / name) if name else "/nowhere/at/all"
    with pytest.raises(ValueError, match=r"--allowed_data_dirs has .*, which is no folder"):
        open_source(config(generated_circles=3, allowed_data_dirs=(given,)))


def test_rows_of_the_hub_name_no_local_files(tmp_path: Path) -> None:
    files = NamedFiles("user/data", None, [tmp_path / "cache"], addresses=True)
    with pytest.raises(BadSampleError, match=r"names a\.png, relative to a folder that user/data does not have"):
        files.find("a.png")
    with pytest.raises(BadSampleError, match=r"names /etc/passwd, outside of what was downloaded of user/data"):
        files.find("/etc/passwd")
    with pytest.raises(BadSampleError, match="outside of what was downloaded"):
        files.find("zip://a.png::/etc/passwd")
    assert files.find(f"{tmp_path}/cache/a.png") == tmp_path / "cache" / "a.png"
    assert files.find("hf://datasets/user/data@main/a.png") == "hf://datasets/user/data@main/a.png"
    assert files.find("zip://a.png::hf://datasets/user/data@main/a.zip") == (
        "zip://a.png::hf://datasets/user/data@main/a.zip"
    )


def test_a_list_of_local_pictures_names_no_addresses(tmp_path: Path) -> None:
    source = open_source(image_folder(tmp_path / "data", "https://user:SECRET@host.example/a.png"))
    assert reason(source[0]) == f"it names https://host.example/a.png; expected a file of {tmp_path / 'data'}"  # type: ignore[index]


# Lists


@pytest.mark.parametrize("layout", ["metadata.jsonl", "prompt.json"])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        *((value, "it has no") for value in (None, [], ["a.png"], "")),
        (3, "it names the number 3; expected the name of a file"),
        (True, "it names true; expected"),
        (1.5, "it names the number 1.5; expected"),
        ({}, "it names an object; expected"),
        ({"bytes": "a"}, "it names an object; expected"),
    ],
)
def test_a_picture_of_another_type_is_skipped(tmp_path: Path, layout: str, value: Any, told: str) -> None:
    if layout == "prompt.json":  # whose first line says whether the keys are there
        folder = write_prompt_json(tmp_path / "data", pairs(2))
        lines = (folder / "prompt.json").read_text().splitlines()
        lines[1] = json.dumps(json.loads(lines[1]) | {"source": value})
        (folder / "prompt.json").write_text("\n".join(lines))
        source = open_source(config(train_data_dir=str(folder)))
        assert reason(source[1]).startswith(told)  # type: ignore[index]
    else:
        source = open_source(image_folder(tmp_path / "data", value))
        assert reason(source[0]).startswith(told)  # type: ignore[index]


DEEP = "[" * 200_000 + "]" * 200_000
CAPTIONS: dict[str, tuple[str, str]] = {
    "half an emoji": (r'"a dog \ud83d"', "half a character"),
    "the other half": (r'"\ude00"', "half a character"),
    "half an emoji in a list": (r'["a dog", "a dog \ud83d"]', "half a character"),
    "a number": ("3", "the number 3"),
    "null": ("null", "no caption"),
    "true": ("true", "its caption is true"),
    "not a number": ("NaN", "no caption"),
    "an object": ('{"a": "b"}', "its caption is an object"),
    "a list of numbers": ("[1, 2]", "a list with the number 1 in it"),
    "a mixed list": ('["a", 3.5]', "a list with the number 3.5 in it"),
    "a list of what is missing": ("[null, NaN]", "no caption"),
    "nested lists": ('[["a"]]', "its caption is a list of lists"),
    "an empty list": ("[]", "no caption"),
    "very many captions": (json.dumps(["a"] * (MOST_CAPTIONS + 1)), "more than 10,000 captions"),
    "a huge number": ("9" * 5000, "no JSON that can be read"),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_bad_captions_of_a_list_are_skipped(tmp_path: Path, kind: str, caplog: Any) -> None:
    value, told = CAPTIONS[kind]
    folder = write_image_folder(tmp_path / "data", pairs(2))
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace('"caption 0"', value)
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    loading = loader(config(train_data_dir=str(folder)))
    loading.batch(0)
    assert loading.skipped == 1
    assert told in caplog.text


@pytest.mark.parametrize("text", ["a\0b", "\x1b[2J", "line\nbreak", "", " ", "\u202e", "\U0001f642"])
def test_odd_captions_are_used(tmp_path: Path, text: str) -> None:
    folder = write_image_folder(tmp_path / "data", [pair | {"text": text} for pair in pairs(2)])
    source = open_source(config(train_data_dir=str(folder)))
    assert reason(source[0]) == ""  # type: ignore[index]
    assert source[0].captions == (text,)  # type: ignore[index]


@pytest.mark.parametrize("name", ["metadata.jsonl", "prompt.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lists no samples; expected one JSON object per line"),
        (b"\n \n", "lists no samples"),
        (b"null", "line 1 is b'null'; expected a JSON object"),
        (b"[]", r"line 1 is b'\[\]'; expected a JSON object"),
        (b'"text"', "line 1 is b'\"text\"'; expected a JSON object"),
        (b"\xff\xfe\x00\x00", "line 1 is not JSON"),
        (b'{"text": "\xff"', "line 1 is not JSON"),
        (b"\x80\x81\x82{", "line 1 is not JSON"),
        (DEEP.encode(), "line 1 is (nested|not JSON)"),
        (b'{"text": ' + DEEP.encode() + b"}", "line 1 is not JSON .*nested more deeply"),
        (b'{"a":' * 100_000, "line 1 is not JSON .*nested more deeply"),
        (b"\x1b[2J{", "line 1 is not JSON"),
        (b"\0" * 1000, "line 1 is not JSON"),
    ],
)
def test_damaged_lists_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {message}") as refused:
        open_source(config(train_data_dir=str(tmp_path)))
    assert str(refused.value).isprintable()


def test_a_list_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "metadata.jsonl").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match="has more than 1,024 MiB"):
        open_source(config(train_data_dir=str(tmp_path)))


def test_a_line_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_LONGEST_LINE", 1000)
    (tmp_path / "metadata.jsonl").write_bytes(b"{" + b" " * 1000 + b"}")
    with pytest.raises(ValueError, match="has a line of more than"):
        open_source(config(train_data_dir=str(tmp_path)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
@pytest.mark.parametrize("separator", ["\n", "\r\n", "\r"])
def test_lists_of_other_editors_are_read(tmp_path: Path, encoding: str, separator: str) -> None:
    folder = write_image_folder(tmp_path / "data", pairs(3))
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[1] = lines[1][:-1] + ', "score": NaN, "box": [1, {"a": 2}], "big": 1' + "0" * 400 + "}"
    (folder / "metadata.jsonl").write_bytes(separator.join([lines[0], "", *lines[1:], ""]).encode(encoding))
    source = open_source(config(train_data_dir=str(folder)))
    assert isinstance(source, RandomAccessSource)
    assert [sample.captions[0] for sample in (source[0], source[1], source[2])] == [f"caption {i}" for i in range(3)]
    assert [source[i].name.rpartition(" line ")[2][:1] for i in range(3)] == ["1", "3", "4"]


def test_the_lists_fingerprint_is_that_of_its_bytes(tmp_path: Path) -> None:
    import hashlib

    folder = write_image_folder(tmp_path / "data", pairs(3))
    source = open_source(config(train_data_dir=str(folder)))
    assert source.manifest["fingerprint"] == hashlib.sha256((folder / "metadata.jsonl").read_bytes()).hexdigest()


# Captions of any source


def test_a_caption_list_is_not_read_to_its_end() -> None:
    def endless() -> Any:
        while True:
            yield "a"

    sample = RawSample(b"i", (b"c",), captions_of(endless()), "endless")
    assert reason(sample) == "it has more than 10,000 captions, more than any honest sample"


@pytest.mark.parametrize("value", [None, math.nan, [None], [], [math.nan, None]])
def test_what_is_missing_is_no_caption(value: Any) -> None:
    assert captions_of(value) == ()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (3, "the number 3"),
        (2.5, "the number 2.5"),
        (True, "true"),
        (b"a", "1 bytes"),
        ({"a": "b"}, "an object"),
        (["a", 3], "a list with the number 3 in it"),
        ([["a"]], "a list of lists"),
        (object(), "of the type object"),
    ],
)
def test_other_values_are_told(value: Any, told: str) -> None:
    with pytest.raises(BadSampleError, match=rf"^its caption is {told}; expected a text"):
        captions_of(value)


def test_of_several_captions_those_that_are_missing_are_none() -> None:
    assert captions_of(["a", None, "b", math.nan]) == ("a", "b")


@pytest.mark.parametrize(
    ("feature", "values", "told"),
    [
        (datasets.Value("int32"), [1, 2], r"numbers \(int32\)"),
        (datasets.Value("float64"), [1.0, None], r"numbers \(float64\)"),
        (datasets.Value("bool"), [True, False], r"numbers \(bool\)"),
        (datasets.ClassLabel(names=["a", "b"]), [0, 1], "class labels"),
    ],
)
def test_a_column_of_no_texts_is_told_before_anything_is_read(
    tmp_path: Path, feature: Any, values: list[Any], told: str
) -> None:
    features = datasets.Features(dict.fromkeys(("image", "conditioning_image"), datasets.Value("binary")))
    columns = {"image": [b"a"] * 2, "conditioning_image": [b"a"] * 2, "text": values}
    saved = datasets.Dataset.from_dict(columns, features=datasets.Features(features | {"text": feature}))
    saved.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=rf"--caption_column is 'text', which in .* holds {told}, not texts"):
        open_source(config(train_data_dir=str(tmp_path / "saved"), load_from_disk=True))


# What is printed


def test_names_and_reasons_are_escaped_and_short(tmp_path: Path, caplog: Any) -> None:
    name = "\x1b[2J\r\n12:00:00 INFO all is well \u202e" + "x" * 10_000 + ".png"
    training = image_folder(tmp_path / "data", name)
    loading = loader(training)
    loading.batch(0)
    (record,) = caplog.records
    assert record.getMessage().isprintable()
    assert len(record.getMessage()) < 2500
    with pytest.raises(ValueError, match="more than --max_skipped_samples=0 allows") as refused:
        loader(config(**vars(training) | {"max_skipped_samples": 0})).batch(0)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 3000
