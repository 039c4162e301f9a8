"""Tars that claim what no honest one does, and shards that are pipes."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from shared.data.sample import BadSampleError
from shared.data.sources import open_source
from shared.data.sources.shard_keys import shard_keys
from shared.data.sources.shards import ShardSource
from shared.data.sources.tar_reading import DamagedTarError, FileContent, StreamContent, regular_files
from tests.shared.data.hostile_data import DAMAGED_TARS, gzip_of_zeros, header, padded, pax, sample, tar
from tests.shared.data.pictures import captions_in, config, loader


def all_of(training: Any) -> list[Any]:
    """Every sample of a configuration's shards, through whichever source reads them."""
    source = open_source(training)
    return list(source.iterate(0)) if hasattr(source, "iterate") else [source[i] for i in range(len(source))]


def packed(folder: Path, content: bytes, how: str) -> Any:
    """A configuration that reads a tar as it is, or as a stream."""
    packers = {"tar": lambda data: data, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}
    if how == "pipe":
        (folder / "a.tar").write_bytes(content)
        return config(train_shards=(f"pipe:cat {folder}/a.tar",), allow_shell_urls=True, shuffle_buffer_size=1)
    (folder / f"a.{how}").write_bytes(packers[how](content))
    return config(train_shards=(str(folder / f"a.{how}"),), shuffle_buffer_size=1)


WAYS = ["tar", "tar.gz", "tar.bz2", "tar.xz", "pipe"]


@pytest.mark.parametrize("how", ["tar", "tar.gz", "pipe"])
@pytest.mark.parametrize("damage", DAMAGED_TARS)
def test_damaged_tars_are_named(tmp_path: Path, damage: str, how: str) -> None:
    training = packed(tmp_path, DAMAGED_TARS[damage], how)
    began = time.monotonic()
    with pytest.raises(ValueError, match="pipe:cat" if how == "pipe" else rf"a\.{how}") as refused:
        all_of(training)
    assert time.monotonic() - began < 10
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("how", WAYS)
def test_honest_tars_are_read_however_they_are_packed(tmp_path: Path, how: str) -> None:
    content = tar([*sample("0"), *sample("1", b"a cat"), ("__meta__", b"x"), ("readme", b"x")])
    read = all_of(packed(tmp_path, content, how))
    assert sorted(found.captions for found in read) == [("a cat",), ("a dog",)]
    assert all(found.image and found.conditions for found in read)


@pytest.mark.parametrize("how", ["tar.gz", "tar.bz2", "tar.xz"])
def test_every_cut_of_a_packed_tar_is_a_sentence(tmp_path: Path, how: str) -> None:
    training = packed(tmp_path, tar(sample()), how)
    path = tmp_path / f"a.{how}"
    content = path.read_bytes()
    for length in range(0, len(content) - 20, 37):
        path.write_bytes(content[:length])
        try:
            all_of(training)
        except ValueError as error:
            assert "reading " in str(error)  # noqa: PT017


@pytest.mark.parametrize("how", ["tar", "pipe"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("number", range(9))
def test_a_tar_that_ends_too_early_is_called_that_with_the_member_it_ends_in(
    tmp_path: Path, number: int, share: float, how: str
) -> None:
    """Cut inside of the content of any member of three samples."""
    members = [member for key in "012" for member in sample(key, b"a caption of some length " * 40)]
    before = len(tar(members[:number], end=False))
    name, content = members[number]
    cut = tar(members)[: before + 512 + int(share * len(content))]
    with pytest.raises(ValueError, match=rf"ends too early, in {re.escape(name)}, as if its copying") as refused:
        all_of(packed(tmp_path, cut, how))
    assert ("a.tar" if how == "tar" else "pipe:cat") in str(refused.value)


@pytest.mark.parametrize("how", ["tar", "pipe"])
def test_a_tar_that_ends_in_a_header_names_the_member_before_it(tmp_path: Path, how: str) -> None:
    whole, first = tar([*sample("0"), *sample("1")]), len(tar(sample("0"), end=False))
    with pytest.raises(ValueError, match=rf"ends too early, after {sample('0')[-1][0]}"):
        all_of(packed(tmp_path, whole[: first + 100], how))


@pytest.mark.parametrize("how", ["tar", "pipe"])
@pytest.mark.parametrize("hole", ["a header", "a member", "an end"])
def test_what_stands_behind_a_hole_is_not_lost_unsaid(tmp_path: Path, hole: str, how: str) -> None:
    """Zeros end a tar. Where a disk was full they stand in the middle; behind them everything would go unread."""
    first, second = tar(sample("0"), end=False), tar(sample("1"))
    content = {
        "a header": first + bytes(512) + second[512:],
        "a member": first + bytes(len(tar(sample("1")[:1], end=False))) + second,
        "an end": tar(sample("0")) + second,
    }[hole]
    with pytest.raises(ValueError, match=rf"zeros at byte {len(first)} end it, and more follows"):
        all_of(packed(tmp_path, content, how))


@pytest.mark.parametrize("how", ["tar", "pipe"])
def test_zeros_after_the_end_are_none_of_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    whole = tar(sample("0"))
    assert len(all_of(packed(tmp_path, whole + bytes(2**21), how))) == 1
    monkeypatch.setattr("shared.data.sources.tar_reading._LARGEST_PADDING", 2**20)
    with pytest.raises(ValueError, match="1 MiB of them and more follow"):
        all_of(packed(tmp_path, whole + bytes(2**22), how))


@pytest.mark.parametrize("how", ["tar", "pipe"])
def test_a_header_extension_without_its_member_is_an_early_end(tmp_path: Path, how: str) -> None:
    content = tar(sample("0"), end=False) + pax(path="1.image.png") + bytes(1024)
    with pytest.raises(ValueError, match=rf"ends too early, after {sample('0')[-1][0]}"):
        all_of(packed(tmp_path, content, how))


@pytest.mark.parametrize("how", ["tar.gz", "tar.bz2", "tar.xz"])
def test_a_packed_tar_that_ends_too_early_names_a_member(tmp_path: Path, how: str) -> None:
    noise = np.random.default_rng(0).bytes(2_500_000)  # bzip2 packs blocks of 900,000 bytes
    training = packed(tmp_path, tar([*sample("0"), *sample("1"), ("2.png", noise)]), how)
    content = (tmp_path / f"a.{how}").read_bytes()
    (tmp_path / f"a.{how}").write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(ValueError, match=r"ends too early, in 2\.png,"):
        all_of(training)


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
    stream=st.booleans(),
)
def test_damaged_bytes_are_samples_or_a_sentence(
    changes: list[tuple[int, int]], stream: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(pax(path="0.image.png") + tar([*sample("0"), *sample("1")]))
    for where, value in changes:
        content[where % len(content)] = value
    training = packed(tmp_path_factory.mktemp("tar"), bytes(content), "tar.gz" if stream else "tar")
    try:
        read = all_of(training)
    except ValueError as error:
        assert str(error).isprintable()  # noqa: PT017
        return
    for found in read:
        try:
            found.check()
        except BadSampleError:
            continue


@pytest.fixture
def small_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit as it would be after the first gigabyte, for bombs that are quick to make."""
    monkeypatch.setattr("shared.data.sources.tar_reading._UNBOUNDED", 2**26)


@pytest.mark.usefixtures("small_bombs")
def test_a_compressed_bomb_is_stopped(tmp_path: Path) -> None:
    gzip_of_zeros(tmp_path / "a.tar.gz", 2**28)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"a\.tar\.gz failed \(it unpacks to more than 100 times its size"):
        open_source(config(train_shards=(str(tmp_path / "a.tar.gz"),)))
    assert time.monotonic() - began < 10


@pytest.mark.usefixtures("small_bombs")
def test_a_bomb_of_bzip2_is_unpacked_piece_by_piece() -> None:
    """A kilobyte of it makes a gigabyte, all at once where it is let."""
    content = bz2.compress(header("0.image.png", 2**40)) + bz2.compress(bytes(2**25)) * 20
    with pytest.raises(DamagedTarError, match="unpacks to more than 100 times"):
        for _ in regular_files(StreamContent(io.BytesIO(content))):
            pass


@pytest.mark.parametrize("how", ["tar", "tar.gz", "pipe"])
def test_members_too_large_are_skipped_unread(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.data.sources.shard_keys.LARGEST_FILE", 1000)
    monkeypatch.setattr("shared.data.sources.shard_keys._LARGEST_CAPTION", 100)
    members = [*sample("0", b"x" * 101), *sample("1"), *sample("2"), ("2.other", bytes(5000))]
    members[3] = ("1.image.png", bytes(1001))
    bad_caption, bad_image, good = all_of(packed(tmp_path, tar(members), how))
    assert bad_caption.defect == "its member .text.txt has 101 bytes, more than any honest one"
    assert bad_image.defect == "its member .image.png has 1,001 bytes, more than any honest one"
    good.check()


def test_members_too_large_together_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.data.sources.shard_stream.LARGEST_FILE", 1000)
    members = [*sample("0"), ("0.image.jpg", bytes(700)), ("0.target.png", bytes(700)), *sample("1")]
    bad, good = all_of(packed(tmp_path, tar(members), "pipe"))
    assert "bytes together, more than any honest sample" in bad.defect
    good.check()


def test_a_better_member_that_comes_later_wins(tmp_path: Path) -> None:
    members = [("0.jpg", b"worse"), ("0.image.png", b"better"), ("0.cond.png", b"C"), ("0.txt", b"t")]
    for how in WAYS:
        (found,) = all_of(packed(tmp_path, tar(members), how))
        assert found.image == b"better"


CAPTIONS = {
    "deep": ("json", b"[" * 200_000 + b"]" * 200_000),
    "deep in an object": ("json", b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "half an emoji": ("json", rb'{"text": "a dog \ud83d"}'),
    "half an emoji alone": ("json", rb'"a dog \ud83d"'),
    "a number": ("json", b"3"),
    "null": ("json", b"null"),
    "nothing": ("json", b""),
    "cut off": ("json", b'{"text": "a'),
    "not UTF-8": ("text.txt", b"\xff\xfe\x00"),
    "UTF-16 without its mark": ("text.txt", "a d\u00f6g".encode("utf-16-le")),
    "very many": ("json", json.dumps(["a"] * 10_001).encode()),
}


@pytest.mark.parametrize("how", ["tar", "tar.gz"])
@pytest.mark.parametrize("kind", CAPTIONS)
def test_bad_captions_are_skipped(tmp_path: Path, kind: str, how: str, caplog: Any) -> None:
    key, content = CAPTIONS[kind]
    loading = loader(packed(tmp_path, tar([*sample("0"), *sample("1", content, key)]), how))
    assert set(captions_in(loading.batch(0))) == {"a dog"}
    assert loading.skipped == 1
    assert len([record for record in caplog.records if "caption" in record.getMessage()]) == 1


def test_names_of_members_are_escaped(tmp_path: Path, caplog: Any) -> None:
    key = "\x1b[2J\n" + "x" * 5000
    name = pax(path=f"{key}.image.png") + header("0") + bytes(0)
    content = tar(sample("0"), end=False) + name + bytes(1024)
    loading = loader(packed(tmp_path, content, "tar"))
    loading.batch(0)
    assert loading.skipped == 1
    assert all(record.getMessage().isprintable() and len(record.getMessage()) < 2500 for record in caplog.records)


@pytest.mark.parametrize("how", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_what_is_no_file_is_no_shard(tmp_path: Path, name: str, how: Any) -> None:
    how(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} is a (named pipe|folder|device): expected a file"):
        open_source(config(train_shards=(str(tmp_path / name),)))
    with pytest.raises(ValueError, match=r"is a (named pipe|folder|device): expected a file"):
        open_source(config(train_shards=(str(tmp_path / "*"),)))


@pytest.mark.parametrize("how", ["shorter", "gone", "pipe"])
def test_a_shard_that_changes_while_training_is_named(tmp_path: Path, how: str) -> None:
    training = packed(tmp_path, tar(sample()), "tar")
    source, path = open_source(training), tmp_path / "a.tar"
    if how == "shorter":
        path.write_bytes(path.read_bytes()[:600])
    else:
        path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError, match=r"a\.tar (has become shorter|cannot be read: No such file|is a named pipe)"):
        source[0]  # type: ignore[index]


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..999999999999}.tar",
        "{0..1000}{0..1000}{0..1000}.tar",
        "{a,b}" * 40 + ".tar",
        "{" * 5000 + "a,b" + "}" * 5000,
        "{0.." + "9" * 5000 + "}.tar",
        "a\0b.tar",
        "\x1b[2J.tar",
        "x" * 5000,
        "https://host/\x1b{0..99999999}.tar",
    ],
)
def test_patterns_that_name_too_much_or_nothing(pattern: str) -> None:
    with pytest.raises(ValueError, match="--train_shards: ") as refused:
        open_source(config(train_shards=(pattern,)))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1500


# Honest tars are read as tarfile and webdataset read them

LONG = "folder/" * 30 + "x" * 80
MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(["0", "1", "d/0", "d.x/1", LONG, "ä", "\udcff", ".h", "__m__"]),
        st.sampled_from(["image.png", "Cond.PNG", "txt", "other", "a.b.c"]),
        st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, b"9"]),
        st.binary(max_size=1100),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda member: (member[0], member[1].lower()),
)


@settings(max_examples=200, deadline=None)
@given(
    MEMBERS,
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from([None, {"comment": "a commit"}]),
)
def test_members_are_those_that_tarfile_finds(
    members: list[tuple[str, str, bytes, bytes]], format_: int, everywhere: dict[str, str] | None
) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_, pax_headers=everywhere) as writer:
        for key, extension, kind, content in members:
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.type, info.size = kind, len(content) if kind not in (tarfile.DIRTYPE, tarfile.SYMTYPE) else 0
            info.mtime = 1.5  # which makes extensions in PAX_FORMAT
            info.linkname = LONG * 2 if kind == tarfile.SYMTYPE and format_ != tarfile.USTAR_FORMAT else ""
            try:
                writer.addfile(info, io.BytesIO(content))
            except ValueError:
                assert format_ == tarfile.USTAR_FORMAT
    with tarfile.open(fileobj=io.BytesIO(file.getvalue()), mode="r:", encoding="utf-8") as reader:
        expected = [
            (info.name, reader.extractfile(info).read())  # type: ignore[union-attr]
            for info in reader
            if info.isreg()
        ]
    content = StreamContent(io.BytesIO(file.getvalue()))
    assert [(name, content.read(size)) for name, size in regular_files(content)] == expected


@settings(max_examples=100, deadline=None)
@given(members=MEMBERS)
def test_samples_are_those_that_webdataset_finds(
    members: list[tuple[str, str, bytes, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    with tarfile.open(folder / "a.tar", "w") as writer:
        for key, extension, content in [
            ("first", "image.png", b"I"),
            ("first", "cond.png", b"C"),
            ("first", "txt", b"t"),
            *((key, extension, content.hex().encode()) for key, extension, _, content in members),
        ]:
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(content)
            writer.addfile(info, io.BytesIO(content))
    with (folder / "a.tar").open("rb") as file:
        grouped = group_by_keys(tar_file_expander([{"url": "u", "stream": file}]))
        expected = [(s["__key__"], s.get("image.png"), s.get("cond.png"), s.get("txt")) for s in grouped]
    keys: dict[str, Any] = {
        "shards_image_key": "image.png",
        "shards_conditioning_key": ("cond.png",),
        "shards_caption_key": "txt",
    }
    command = f"pipe:cat {folder}/a.tar"
    streamed = all_of(config(train_shards=(command,), allow_shell_urls=True, shuffle_buffer_size=1, **keys))
    indexed = ShardSource([folder / "a.tar"], shard_keys("image.png", ("cond.png",), "txt"))
    for found in (streamed, [indexed[i] for i in range(len(indexed))]):
        assert [
            (s.name.rpartition(":")[2], s.image, *s.conditioning_images, s.captions[0].encode() if s.captions else None)
            for s in found
        ] == expected


def test_padding_after_the_last_member_is_part_of_a_tar(tmp_path: Path) -> None:
    """As tarfile has it; the blocks of zeros after it may be missing, or cut."""
    whole = header("a.txt", 5) + padded(b"12345")
    for content_of_tar, complete in [(whole, True), (whole + bytes(100), True), (whole[:-1], False)]:
        (tmp_path / "a.tar").write_bytes(content_of_tar)
        with (tmp_path / "a.tar").open("rb") as file:
            for content in (FileContent(file.fileno()), StreamContent(io.BytesIO(content_of_tar))):
                if complete:
                    assert list(regular_files(content)) == [("a.txt", 5)]
                else:
                    with pytest.raises(DamagedTarError, match=r"it ends too early, in a\.txt,"):
                        list(regular_files(content))
