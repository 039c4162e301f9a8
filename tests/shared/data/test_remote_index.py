"""With an index beside them, remote shards are the local ones, and no more of them is read than is used."""

import gc
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.data.batches import BatchSpec
from shared.data.remote import retrying
from shared.data.sources import RandomAccessSource, StreamSource, base, open_source, open_sources, remote_shards
from shared.data.sources.shard_index import SUFFIX, ShardIndex
from shared.prepare_data.command import main
from tests.shared.data.hostile_data import padded, tar
from tests.shared.data.pictures import config, loader, pairs, png, write_tars
from tests.shared.data.remote_server import Request, Server, running_server

SHARDS = "/train-{000..002}.tar"
INDEX = f"/train-000.tar{SUFFIX}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three and their index."""
    folder = write_tars(tmp_path_factory.mktemp("shards"), pairs(20)).parent
    assert main(["index", f"{folder}/*.tar"]) == 0
    return folder


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(retrying, "_LONGEST_PAUSE", 0.01)


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with running_server() as served:
        served.objects = {f"/{path.name}": path.read_bytes() for path in shards.iterdir()}
        yield served


def opened(address: str, **values: Any) -> RandomAccessSource:
    source = open_source(config(train_shards=(address,), **values))
    assert isinstance(source, RandomAccessSource)
    return source


def without_location(source: RandomAccessSource) -> dict[str, Any]:
    return {name: value for name, value in source.manifest.items() if name != "location"}


def test_a_run_is_the_same_from_afar(shards: Path, server: Server) -> None:
    local, remote = opened(f"{shards}/*.tar"), opened(f"{server.address}{SHARDS}?token=SECRET")
    assert "SECRET" not in str(remote.manifest)
    assert without_location(remote) == without_location(local)
    for workers, steps_from in ((0, 0), (2, 3)):
        for host in range(2):
            training = config(dataloader_num_workers=workers)
            ours = loader(training, BatchSpec(2, 2, 2), host, 2, source=remote)
            expected = loader(config(), BatchSpec(2, 2, 2), host, 2, source=local)
            for _, (step, batch) in zip(range(3), ours.iterate(steps_from), strict=False):
                for name, array in expected.batch(step).items():
                    np.testing.assert_array_equal(array, batch[name])
            ours.close()


def test_captions_held_out_and_chosen_samples_are_the_same(shards: Path, server: Server) -> None:
    values: dict[str, Any] = {"num_evaluation_samples": 4, "max_train_samples": 9}
    chosen, held_out = open_sources(config(train_shards=(f"{server.address}{SHARDS}",), **values))
    expected, expected_held_out = open_sources(config(train_shards=(f"{shards}/*.tar",), **values))
    for ours, theirs in ((chosen, expected), (held_out, expected_held_out)):
        assert isinstance(ours, base.SubsetSource)
        assert isinstance(theirs, base.SubsetSource)
        for place in range(len(theirs)):
            ours.read_ahead(place)
        assert [ours[place].image for place in range(len(ours))] == [
            t.image for t in map(theirs.__getitem__, range(len(theirs)))
        ]
        assert [ours.captions(place) for place in range(len(ours))] == list(map(theirs.captions, range(len(theirs))))


def test_a_subset_in_another_order_is_the_same(shards: Path, server: Server) -> None:
    names = ("train-000.tar", "train-002.tar", "train-000.tar")
    local = open_source(config(train_shards=tuple(f"{shards}/{name}" for name in names)))
    remote = open_source(config(train_shards=tuple(f"{server.address}/{name}" for name in names)))
    assert isinstance(local, RandomAccessSource)
    assert isinstance(remote, RandomAccessSource)
    assert without_location(remote) == without_location(local)
    assert [remote[k].image for k in range(len(remote))] == [local[k].image for k in range(len(local))]


def test_a_sample_costs_one_request_for_its_own_bytes(server: Server) -> None:
    source = opened(server.address + SHARDS)
    server.requests.clear()
    server.bytes.clear()
    sample = source[11]
    assert isinstance(sample.image, bytes)
    (condition,) = sample.conditioning_images
    assert isinstance(condition, bytes)
    assert dict(server.requests) == {"/train-001.tar": 1}
    parts = (sample.image, condition, sample.captions[0].encode())
    # Their headers, and those that webdataset's writer extends, as it does for times.
    assert server.bytes["/train-001.tar"] <= sum(len(padded(part)) for part in parts) + 3 * 3 * 512


def test_members_that_nobody_wants_are_not_read_where_they_are_large(tmp_path: Path, server: Server) -> None:
    members = [("a.jpg", png(1, 9, 9)), ("a.raw", bytes(3 * 2**20)), ("a.cond.png", png(2, 9, 9)), ("a.txt", b"words")]
    (tmp_path / "x.tar").write_bytes(tar(members))
    assert main(["index", f"{tmp_path}/x.tar"]) == 0
    server.objects |= {f"/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
    source = opened(f"{server.address}/x.tar")
    assert (source[0].image, *source[0].conditioning_images) == (members[0][1], members[2][1])
    assert server.bytes["/x.tar"] < 10**5


def test_what_is_announced_is_read_together_and_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer comes before the others are asked for."""
    source = opened(server.address + SHARDS)
    assert isinstance(source, base.ReadsAhead)
    server.requests.clear()
    together = threading.Barrier(8, timeout=20)

    def wait(request: Request) -> None:
        together.wait()

    server.fault = wait
    for index in (*range(8), 3):
        source.read_ahead(index)
    assert [source[index].captions for index in range(8)] == [(f"caption {index}",) for index in range(8)]
    assert sum(server.requests.values()) == 8
    server.fault = lambda request: None
    monkeypatch.setattr(remote_shards, "_MOST_AHEAD", 1)
    for index in range(8):
        source.read_ahead(index)
    assert [source[index].captions for index in range(8)] == [(f"caption {index}",) for index in range(8)]


def test_faults_are_mended(shards: Path, server: Server) -> None:
    def fault(request: Request) -> None:
        if request.number % 3 == 0:
            request.fail(503)
        elif request.number % 3 == 1:
            request.drop_after(len(request.body) // 2)

    server.fault = fault
    local, remote = opened(f"{shards}/*.tar"), opened(server.address + SHARDS)
    assert [remote[k].image for k in range(20)] == [local[k].image for k in range(20)]


def test_the_readers_end_with_the_source(server: Server) -> None:
    before = set(threading.enumerate())
    source = opened(server.address + SHARDS)
    readers = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("data-")]
    assert readers
    del source
    gc.collect()
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()


# Making it


def test_an_index_that_is_made_from_afar_is_the_same(shards: Path, server: Server, tmp_path: Path) -> None:
    path = tmp_path / "made"
    assert main(["index", server.address + SHARDS, "--output_file", str(path)]) == 0
    made, local = ShardIndex(path), ShardIndex(shards / INDEX.lstrip("/"))
    assert made.description.sha256 == local.description.sha256
    assert made.description.fingerprint == local.description.fingerprint
    for ours, theirs in zip(made.description.shards, local.description.shards, strict=True):
        assert (ours.name, ours.size, ours.samples) == (theirs.name, theirs.size, theirs.samples)
    server.objects[INDEX] = path.read_bytes()
    assert opened(server.address + SHARDS)[19].captions == ("caption 19",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{server}/train-000.tar"], "remote shards need --output_file, .*--output_file train-000.tar.shard_index"),
        (["{server}/absent.tar", "--output_file", "x"], r"absent\.tar cannot be read: HTTP 404 Not Found"),
        (["{server}/train-000.tar.gz", "--output_file", "x"], "cannot be indexed: expected uncompressed tars"),
        (["{server}/cut.tar", "--output_file", "x"], r"cut\.tar cannot be read as an uncompressed tar: it ends too"),
        (["{server}/train-000.tar", "{server}/other/train-001.tar", "--output_file", "x"], "in several folders"),
        (["{server}/train-000.tar", "{shards}/train-001.tar", "--output_file", "x"], "some .* local and some remote"),
        (["{shards}/train-001.tar", "--output_file", "x"], "--output_file is about remote shards"),
        (["ftp://host/a.tar", "--output_file", "x"], "'ftp://host/a.tar' cannot be indexed"),
    ],
)
def test_what_cannot_be_indexed_is_told(
    server: Server,
    shards: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    server.objects["/cut.tar"] = server.objects["/train-000.tar"][:70_000]
    assert main(["index", *(word.format(server=server.address, shards=shards) for word in words)]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not list(tmp_path.iterdir())


# Where there is none, or another


def test_without_one_shards_are_streamed_and_that_is_said(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    del server.objects[INDEX]
    assert isinstance(open_source(config(train_shards=(server.address + SHARDS,))), StreamSource)
    assert "No index lies beside the remote shards: they are read from front to back, and shuffled" in caplog.text


def test_a_page_in_its_place_is_none(server: Server) -> None:
    server.objects[INDEX] = b"<!DOCTYPE html><p>There is nothing here</p>"
    assert isinstance(open_source(config(train_shards=(server.address + SHARDS,))), StreamSource)


def test_one_of_other_shards_or_keys_is_not_used(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.objects["/train-003.tar"] = server.objects["/other/train-001.tar"] = server.objects["/train-001.tar"]
    for names in (("train-000.tar", "train-003.tar"), ("train-000.tar", "other/train-001.tar")):
        caplog.clear()
        source = open_source(config(train_shards=tuple(f"{server.address}/{name}" for name in names)))
        assert isinstance(source, StreamSource)
        assert f"{names[1]} is not in it" in caplog.text
    source = open_source(config(train_shards=(server.address + SHARDS,), shards_caption_key="text.txt"))
    assert isinstance(source, StreamSource)
    assert "is not used: it was made with other --shards_…_key" in caplog.text


def test_one_that_is_there_but_cannot_be_read_is_an_error(server: Server) -> None:
    """Another host may be able to read it, and would then see the samples in another order."""
    server.fault = lambda request: request.fail(503)
    with pytest.raises(ValueError, match=rf"looking for \S+{INDEX} failed \(HTTP 503 .*, after 8 tries\)"):
        open_source(config(train_shards=(server.address + SHARDS,)))


@pytest.mark.parametrize("damage", ["cut off", "other records", "claims too much"])
def test_one_that_is_damaged_is_named(server: Server, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    content = server.objects[INDEX]
    if damage == "claims too much":
        monkeypatch.setattr(remote_shards, "_LARGEST_INDEX", 1000)
        expected = rf"failed \(it claims {len(content):,} bytes, more than any honest one"
    elif damage == "cut off":
        server.objects[INDEX], expected = content[:-1], "is no whole index of shards: it has"
    else:
        server.objects[INDEX] = content[:-1] + bytes([content[-1] ^ 1])
        expected = "is no whole index of shards: its records are not what was written"
    with pytest.raises(ValueError, match=rf"{INDEX} {expected}") as refused:
        open_source(config(train_shards=(f"{server.address}/train-000.tar?token=SECRET",)))
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("change", ["other content", "another size", "gone"])
def test_a_shard_that_is_not_the_one_that_was_indexed_is_noticed(server: Server, change: str) -> None:
    source = opened(server.address + SHARDS)
    content = server.objects["/train-000.tar"]
    if change == "other content":
        server.objects["/train-000.tar"] = content.replace(b"0000.image", b"0000.omage")
    elif change == "another size":
        server.objects["/train-000.tar"] = content + bytes(512)
    else:
        del server.objects["/train-000.tar"]
    reason = {
        "other content": "it has changed since it was indexed",
        "another size": "it has changed while it was read: from",
        "gone": "HTTP 404 Not Found",
    }[change]
    with pytest.raises(ValueError, match=rf"train-000\.tar cannot be read: {reason}.* index it again"):
        source[0]


def test_a_server_without_ranges_is_streamed(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def whole(request: Request) -> None:
        if request.path in server.objects:
            request.answer_whole(server.objects[request.path])

    server.fault = whole
    with caplog.at_level(logging.WARNING):
        assert isinstance(open_source(config(train_shards=(server.address + SHARDS,))), StreamSource)
    assert "does not answer with ranges" in caplog.text
