"""Remote shards without an index are divided between hosts, and no batch depends on between how many."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import TrainConfig
from shared.data.batches import Batch, BatchSpec
from shared.data.lanes import LaneLayout
from shared.data.remote import Readers, read_ahead, retrying
from shared.data.sources import open_source
from shared.data.sources.shard_stream import ShardStream
from tests.shared.data.hostile_data import tar
from tests.shared.data.pictures import captions_in, config, loader, png
from tests.shared.data.remote_server import Request, Server, running_server

SHARDS, SAMPLES = 8, 24
PIECE = 20_000
WHOLE = BatchSpec(16)


def shard(number: int, samples: int = SAMPLES) -> bytes:
    """Captions tell the shard and the place in it."""
    members = []
    for place in range(samples):
        picture = png(place % 4, 40, 40)
        parts = (("png", picture), ("cond.png", picture), ("txt", f"{number} {place}".encode()))
        members += [(f"{number:03d}_{place:03d}.{extension}", content) for extension, content in parts]
    return tar(members)


@pytest.fixture(scope="module")
def shards() -> dict[str, bytes]:
    return {f"{number:03d}.tar": shard(number) for number in range(SHARDS)}


@pytest.fixture
def server(shards: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Its shards are read in small ranges, faults after short pauses."""
    monkeypatch.setattr(read_ahead, "PIECE", PIECE)
    monkeypatch.setattr(retrying, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(retrying, "_LONGEST_PAUSE", 0.01)
    with running_server() as served:
        serve(served, shards)
        yield served


def serve(server: Server, shards: dict[str, bytes]) -> None:
    """For every host under an address of its own, so that what each reads can be told."""
    server.objects = {f"/{host}/{name}": content for host in range(8) for name, content in shards.items()}


def streamed(server: Server, host: int = 0, **values: Any) -> TrainConfig:
    addresses = tuple(f"{server.address}{path}" for path in sorted(server.objects) if path.startswith(f"/{host}/"))
    return config(**{"train_shards": addresses, "resolution": 8, "shuffle_buffer_size": 1} | values)


def batches(
    server: Server, steps: range, spec: BatchSpec = WHOLE, host: int = 0, hosts: int = 1, **values: Any
) -> list[Batch]:
    loading = loader(streamed(server, host, **values), spec, host, hosts)
    got = [batch for _, (_, batch) in zip(steps, loading.iterate(steps.start), strict=False)]
    loading.close()
    return got


def rows(parts: list[Batch]) -> dict[str, Any]:
    """The rows of a step in their order, from the parts of all hosts."""
    joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in joined.items()}


@settings(max_examples=100)
@given(
    per_device=st.integers(1, 6),
    devices_per_host=st.sampled_from([1, 2, 4]),
    hosts=st.sampled_from([1, 2, 3, 4, 8]),
    accumulation=st.sampled_from([1, 2, 3]),
    most=st.integers(1, 64),
)
def test_every_row_has_a_lane_and_hosts_share_none_where_they_divide_them(
    per_device: int, devices_per_host: int, hosts: int, accumulation: int, most: int
) -> None:
    spec = BatchSpec(per_device, devices_per_host * hosts, accumulation)
    layout = LaneLayout.of_steps(spec.global_batch_size, most)
    assert layout.count <= most
    assert layout.count * layout.width == spec.global_batch_size
    assert layout == LaneLayout.of_steps(BatchSpec(spec.global_batch_size).global_batch_size, most)
    places = [layout.place(position) for position in range(3 * spec.global_batch_size)]
    for lane in range(layout.count):
        assert [number for other, number in places if other == lane] == list(range(3 * layout.width))
    of_hosts = [layout.of_host(spec.positions(0, host, hosts)) for host in range(hosts)]
    for host, lanes in enumerate(of_hosts):
        assert {layout.place(int(position))[0] for position in spec.positions(2, host, hosts).flat} == set(lanes)
    read = Counter(lane for lanes in of_hosts for lane in lanes)
    assert sorted(read) == list(range(layout.count))
    if layout.count % (hosts * accumulation) == 0:
        assert set(read.values()) == {1}


@pytest.mark.parametrize(
    ("rows_", "most", "count"), [(160, 64, 32), (24, 64, 24), (24, 5, 4), (96, 200, 96), (7, 3, 1)]
)
def test_lanes_are_as_many_as_hosts_may_be(rows_: int, most: int, count: int) -> None:
    assert LaneLayout.of_steps(rows_, most).count == count


@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize(
    ("spec", "hosts", "workers"),
    [((4, 4, 1), 4, 0), ((4, 4, 1), 2, 3), ((2, 4, 2), 4, 2), ((16, 1, 1), 1, 2)],
)
def test_batches_are_the_same_for_every_division_and_a_host_reads_only_its_own(
    server: Server, spec: tuple[int, int, int], hosts: int, workers: int, faulty: bool
) -> None:
    if faulty:
        server.fault = lambda request: request.fail(503) if request.number % 3 == 1 else None
    steps = range(5)
    of_hosts = [
        batches(server, steps, BatchSpec(*spec), host, hosts, dataloader_num_workers=workers) for host in range(hosts)
    ]
    for host, of_host in enumerate(of_hosts):
        used = {int(caption.split()[0]) for batch in of_host for caption in captions_in(batch)}
        assert len(used) == SHARDS // hosts
        read = {int(path[3:6]): count for path, count in server.bytes.items() if path.startswith(f"/{host}/") and count}
        assert set(read) <= used | {0}, "but for the first sample of all, at which every host looks"
        assert 0 in used or read[0] < len(server.objects["/0/000.tar"]) / 4
    expected = [rows([batch]) for batch in batches(server, steps)]
    for step, want in enumerate(expected):
        got = rows([of_host[step] for of_host in of_hosts])
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_an_epoch_has_every_sample_once_where_shards_are_alike(server: Server) -> None:
    steps = SHARDS * SAMPLES // 16
    read = batches(server, range(2 * steps))
    epochs = [[caption for batch in part for caption in captions_in(batch)] for part in (read[:steps], read[steps:])]
    everything = {f"{number} {place}" for number in range(SHARDS) for place in range(SAMPLES)}
    for epoch in epochs:
        assert len(epoch) == len(everything)
        assert set(epoch) == everything
    assert epochs[0] != epochs[1]
    assert len({caption.split()[0] for caption in epochs[0][:16]}) == SHARDS, "a step has samples of all lanes"


def test_lanes_of_unlike_shards_use_all_samples_alike_in_the_long_run(server: Server) -> None:
    """Five shards and four lanes, which none waits for another: after five turns of a lane it has read five shards."""
    serve(server, {f"{number:03d}.tar": shard(number, 2 + number) for number in range(5)})
    source = open_source(streamed(server, shuffle_buffer_size=12))
    assert isinstance(source, ShardStream)
    seen: Counter[str] = Counter()
    for lane in source.lanes(4, range(4)).values():
        for turn in range(2):
            seen.update(sample.captions[0] for sample in lane.iterate(turn))
    assert len(seen) == sum(range(2, 7))
    assert set(seen.values()) == {8}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_host_resumes_from_its_own_lanes_alone(server: Server, workers: int) -> None:
    values = {"shuffle_buffer_size": 40, "dataloader_num_workers": workers}
    uninterrupted = batches(server, range(20), BatchSpec(4, 4), **values)
    resumed = batches(server, range(9, 12), BatchSpec(4, 4), 1, 4, **values)
    whole = len(server.objects["/1/000.tar"])
    assert sum(count > whole / 4 for path, count in server.bytes.items() if path.startswith("/1/")) <= 4
    for expected, got in zip(uninterrupted[9:12], resumed, strict=True):
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array[:, 4:8], err_msg=name)


def test_a_bad_sample_is_replaced_by_the_next_of_its_lane(server: Server) -> None:
    good = [captions_in(batch) for batch in batches(server, range(4))]
    number, place = map(int, good[1][6].split())
    damaged = bytearray(server.objects[f"/0/{number:03d}.tar"])
    begin = damaged.index(b"\x89PNG", damaged.index(f"{number:03d}_{place:03d}.png".encode()))
    damaged[begin : begin + 8] = bytes(8)
    server.objects[f"/0/{number:03d}.tar"] = bytes(damaged)
    loading = loader(streamed(server), BatchSpec(16))
    after = [captions_in(loading.batch(step)) for step in range(4)]
    changed = [(step, row) for step in range(4) for row in range(16) if good[step][row] != after[step][row]]
    assert changed == [(1, 6)]
    assert after[1][6] == f"{number} {place + 1}"
    assert loading.skipped == 1


def test_hosts_that_cannot_divide_the_shards_are_told_what_lets_them(
    server: Server, shards: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    serve(server, dict(list(shards.items())[:6]))  # four lanes of sixteen rows
    expected = [rows([batch]) for batch in batches(server, range(2))]
    assert "divide" not in caplog.text
    with caplog.at_level(logging.WARNING):
        of_hosts = [batches(server, range(2), BatchSpec(2, 8), host, 8) for host in range(8)]
    assert "8 hosts cannot divide the shards evenly (lanes: 4): together they read them 2.0 times" in caplog.text
    assert "python3 -m shared.prepare_data index ADDRESSES --output_file" in caplog.text
    for step, want in enumerate(expected):
        np.testing.assert_array_equal(rows([of_host[step] for of_host in of_hosts])["input_ids"], want["input_ids"])
    caplog.clear()
    serve(server, dict(list(shards.items())[:1]))
    loader(streamed(server), WHOLE, 0, 1)
    assert "divide" not in caplog.text
    alone, first, second = (loader(streamed(server), BatchSpec(8, 2), *of) for of in ((0, 1), (0, 2), (1, 2)))
    assert "2 hosts cannot divide the shards evenly (lanes: 1): together they read them 2.0 times" in caplog.text
    assert captions_in(alone.batch(1)) == [*captions_in(first.batch(1)), *captions_in(second.batch(1))]


def test_the_first_samples_alone_are_read_whole_by_every_host(server: Server) -> None:
    source = open_source(streamed(server, max_train_samples=30))
    assert isinstance(source, ShardStream)
    assert source.most_lanes == 1
    assert {sample.captions[0].split()[0] for sample in source.iterate(3)} == {"0", "1"}
    plain = open_source(streamed(server))
    assert plain.manifest["most_lanes"] == SHARDS
    assert json.loads(json.dumps(plain.manifest)) == plain.manifest


def test_what_goes_wrong_in_a_lane_reaches_who_needs_it(server: Server) -> None:
    def gone(request: Request) -> None:
        if request.path == "/0/005.tar":
            request.fail(404)

    server.fault = gone
    loading = loader(streamed(server, dataloader_num_workers=2), BatchSpec(16))
    with pytest.raises(ValueError, match=r"reading http://\S+/0/005\.tar failed \(HTTP 404 Not Found\)"):
        next(iter(loading))
    loading.close()


@given(st.integers(1, 64))
def test_many_sequences_take_no_more_memory_than_one(sequences: int) -> None:
    one, many = Readers(), Readers(sequences)
    assert one.piece == read_ahead.PIECE
    assert many.window >= 2
    assert sequences * (many.window + 1) * many.piece <= (one.window + 1) * one.piece
