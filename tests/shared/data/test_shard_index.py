"""The index beside shards changes when a run starts, and nothing else."""

import gc
import io
import logging
import os
import random
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from shared.data.sources import RandomAccessSource, open_source, shards
from shared.data.sources.shard_index import SUFFIX
from shared.data.sources.shard_keys import shard_keys
from shared.data.sources.shards import ShardSource
from shared.prepare_data import indexing
from shared.prepare_data.command import main
from shared.prepare_data.indexing import index_shards
from tests.shared.data.index_corruptions import run_cases
from tests.shared.data.pictures import config, loader, pairs, write_tars

KEYS = shard_keys(None, None, None)


def write_tar(path: Path, members: list[tuple[str, bytes]], **facts: Any) -> None:
    with tarfile.open(path, "w", format=facts.pop("format", tarfile.GNU_FORMAT)) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            for fact, value in facts.items():
                setattr(header, fact, value)
            tar.addfile(header, io.BytesIO(content))


def sources_of(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> tuple[RandomAccessSource, RandomAccessSource]:
    """The same shards without an index, and with one, in which no header is read at the start."""
    training = config(train_shards=names)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "find_index", lambda *_: None)
        without = open_source(training)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "member_groups", None)
        indexed = open_source(training)
    assert isinstance(without, RandomAccessSource)
    assert isinstance(indexed, RandomAccessSource)
    return without, indexed


@pytest.mark.parametrize(
    "chosen", [("train-{000..002}.tar",), ("train-*.tar",), ("train-001.tar", "train-000.tar"), ("train-002.tar",) * 2]
)
def test_a_run_is_the_same_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: tuple[str, ...]
) -> None:
    write_tars(tmp_path, pairs(20))
    assert main(["index", f"{tmp_path}/train-*.tar", "--num_workers", "2"]) == 0
    names = tuple(f"{tmp_path}/{name}" for name in chosen)
    without, indexed = sources_of(names, monkeypatch)
    assert indexed.manifest == without.manifest
    assert [indexed[place] for place in range(len(indexed))] == [without[place] for place in range(len(without))]
    training = config(train_shards=names)
    for step in range(3):
        batches = [loader(training, source=source).batch(step) for source in (without, indexed)]
        for name, array in batches[0].items():
            np.testing.assert_array_equal(array, batches[1][name])


def test_shards_of_several_folders_have_an_index_in_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_tars(tmp_path / name, pairs(12))
    assert main(["index", f"{tmp_path}/a/*.tar", f"{tmp_path}/b/train-000.tar", f"{tmp_path}/b/train-001.tar"]) == 0
    assert len(list(tmp_path.glob(f"*/*{SUFFIX}"))) == 2
    without, indexed = sources_of((f"{tmp_path}/b/*.tar", f"{tmp_path}/a/*"), monkeypatch)
    assert indexed.manifest == without.manifest
    assert [indexed[place] for place in range(24)] == [without[place] for place in range(24)]


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "dir.x/a", "ä" * 70, "\udcff", "n" * 120, ".h", "__m__"]),
        st.sampled_from(["image.png", "Cond.PNG", "txt", "other"]),
    ),
    min_size=1,
    max_size=12,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(members=MEMBERS, format_=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_an_index_knows_the_samples_that_webdataset_finds(
    members: list[tuple[str, str]], format_: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    names = ["first.image.png", "first.cond.png", "first.txt", *(f"{key}.{ending}" for key, ending in members)]
    write_tar(path, [(name, name.encode("utf-8", "backslashreplace")) for name in names], format=format_)
    with path.open("rb") as file:
        found = tar_file_expander([{"url": str(path), "stream": file}])
        expected = [(s["__key__"], s.get("image.png"), s.get("cond.png"), s.get("txt")) for s in group_by_keys(found)]
    keys = shard_keys("image.png", ("cond.png",), "txt")
    index_shards([path], keys, 0)
    source = ShardSource([path], keys)
    assert [
        (s.name.partition(":")[2], s.image, *s.conditioning_images, s.captions[0].encode() if s.captions else None)
        for s in (source[place] for place in range(len(source)))
    ] == expected


def test_what_img2dataset_writes_is_indexed_but_no_training_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(f"{key:09d}.{ending}", b"{}") for key in range(3) for ending in ("jpg", "json", "txt")]
    write_tar(tmp_path / "00000.tar", members)
    assert main(["index", f"{tmp_path}/00000.tar"]) == 0
    said = capsys.readouterr().err
    assert "3 of them have no condition" in said
    assert "no caption" not in said
    with pytest.raises(ValueError, match=r"has the keys jpg, json, txt, .*set --shards_conditioning_key"):
        open_source(config(train_shards=(f"{tmp_path}/00000.tar",)))


@pytest.mark.parametrize("change", ["other members", "in another order", "written again", "shorter"])
def test_a_shard_that_has_changed_is_noticed_before_its_bytes_are_used(tmp_path: Path, change: str) -> None:
    members = [(f"{key}.{ending}", b"I" * 700) for key in "ab" for ending in ("jpg", "cond.png", "txt")]
    path = tmp_path / "x.tar"
    write_tar(path, members, mtime=1)
    size = path.stat().st_size
    index_shards([path], KEYS, 0)
    if change == "shorter":
        write_tar(path, members[:3])
        with path.open("r+b") as file:
            file.truncate(size - 512)
        with pytest.raises(ValueError, match=r"x\.tar has [\d,]+ bytes, and had [\d,]+ when .* Index it again"):
            open_source(config(train_shards=(str(path),)))
    else:
        changed = {
            "other members": [(name.replace("b.", "c."), content) for name, content in members],
            "in another order": [*members[3:], *members[:3]],
            "written again": members,
        }[change]
        write_tar(path, changed, mtime=2 if change == "written again" else 1)
        assert path.stat().st_size == size
        source = open_source(config(train_shards=(str(path),)))
        assert isinstance(source, RandomAccessSource)
        with pytest.raises(ValueError, match=r"x\.tar has changed since it was indexed\. Index it again"):
            source[1]
    assert main(["index", str(path)]) == 0
    source = open_source(config(train_shards=(str(path),)))
    assert isinstance(source, RandomAccessSource)
    assert source[0].captions == ("I" * 700,)


def test_an_index_is_used_where_it_covers_the_shards_and_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tars(tmp_path, pairs(20))
    index_shards([tmp_path / "train-001.tar"], KEYS, 0)
    with caplog.at_level(logging.WARNING):
        assert len(open_source(config(train_shards=(f"{tmp_path}/*.tar",)))) == 20  # type: ignore[arg-type]
    assert "2 of 3 shards are in none, such as" in caplog.text
    index_shards(sorted(tmp_path.glob("*.tar")), KEYS, 0)
    caplog.clear()
    other = {"shards_caption_key": "text.txt"}
    assert len(open_source(config(train_shards=(f"{tmp_path}/*.tar",), **other))) == 20  # type: ignore[arg-type]
    assert "is not used: it was made with other --shards_…_key" in caplog.text


def test_only_what_has_changed_is_indexed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a killed indexing goes on, and a growing data set is indexed at the cost of what is new."""
    write_tars(tmp_path, pairs(20))
    paths = sorted(tmp_path.glob("*.tar"))
    read: list[str] = []
    original = indexing.read_shard
    monkeypatch.setattr(indexing, "read_shard", lambda path, keys: read.append(path.name) or original(path, keys))
    index_shards(paths[:2], KEYS, 0)
    os.utime(paths[0], ns=(time.time_ns(), time.time_ns() + 10**9))
    read.clear()
    path = index_shards(paths, KEYS, 0)
    assert read == ["train-000.tar", "train-002.tar"]
    content = path.read_bytes()
    path.unlink()
    assert index_shards(paths, KEYS, 2).read_bytes() == content, "it is what is made at once"

    class Killed(BaseException):
        pass

    def killed_at_the_last(path: Path, keys: Any) -> Any:
        if path == paths[2]:
            raise Killed
        return original(path, keys)

    path.unlink()
    monkeypatch.setattr(indexing, "_SAVED_EVERY", -1.0)
    monkeypatch.setattr(indexing, "read_shard", killed_at_the_last)
    with pytest.raises(Killed):
        index_shards(paths, KEYS, 0)
    read.clear()
    monkeypatch.setattr(indexing, "read_shard", lambda path, keys: read.append(path.name) or original(path, keys))
    assert index_shards(paths, KEYS, 0).read_bytes() == content
    assert read == ["train-002.tar"]


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    write_tars(tmp_path, pairs(3))
    path = tmp_path / f"train-000.tar{SUFFIX}"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"shard_index is no whole index of shards: .*\. Delete it, or make"):
        open_source(config(train_shards=(f"{tmp_path}/*.tar",)))
    assert main(["index", f"{tmp_path}/*.tar"]) == 0
    assert len(open_source(config(train_shards=(f"{tmp_path}/*.tar",)))) == 3  # type: ignore[arg-type]


def test_a_pipe_in_the_place_of_an_index_is_not_waited_for(tmp_path: Path) -> None:
    write_tars(tmp_path, pairs(3))
    os.mkfifo(tmp_path / f"train-000.tar{SUFFIX}")
    with pytest.raises(ValueError, match="is a named pipe: expected a file"):
        open_source(config(train_shards=(f"{tmp_path}/*.tar",)))


def test_random_corruptions_are_refused_or_harmless(tmp_path: Path) -> None:
    first = random.Random(time.time_ns()).randrange(10**9)  # others every time; the number is in the failure
    ends = run_cases(tmp_path, range(first, first + 400))
    assert ends["refused"] > 250, ends


def test_an_index_is_closed_with_its_source(tmp_path: Path) -> None:
    gc.collect()  # what other tests have left
    write_tars(tmp_path, pairs(3))
    index_shards([tmp_path / "train-000.tar"], KEYS, 0)
    source = open_source(config(train_shards=(f"{tmp_path}/*.tar",)))
    assert _open_indexes() == [f"{tmp_path}/train-000.tar{SUFFIX}"]
    del source
    gc.collect()
    assert not _open_indexes()


def _open_indexes() -> list[str]:
    descriptors = Path("/proc/self/fd")
    names = [os.readlink(descriptors / number) for number in os.listdir(descriptors) if (descriptors / number).exists()]
    return [name for name in names if name.endswith(SUFFIX)]
