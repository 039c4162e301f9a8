"""Remote shards are, through any fault, the local ones: the same samples in the same order, or a sentence."""

import gzip
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.data.remote import RemoteError, RemoteStreams, read_ahead, retrying
from shared.data.sample import RawSample
from shared.data.sources import StreamSource, open_source
from tests.shared.data.hostile_data import tar
from tests.shared.data.pictures import config, pairs, write_tars
from tests.shared.data.remote_server import Fault, Request, Server, running_server

PIECE = 20_000
SHARDS = "/train-{000..002}.tar"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three."""
    return write_tars(tmp_path_factory.mktemp("shards"), pairs(20)).parent


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ranges and short pauses."""
    monkeypatch.setattr(read_ahead, "PIECE", PIECE)
    monkeypatch.setattr(retrying, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(retrying, "_LONGEST_PAUSE", 0.01)


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with running_server() as served:
        served.objects = {f"/{path.name}": path.read_bytes() for path in shards.glob("*.tar")}
        yield served


def samples_of(epoch: int, *locations: str, **values: Any) -> list[RawSample]:
    source = open_source(config(train_shards=locations, allow_shell_urls=True, shuffle_buffer_size=5, **values))
    assert isinstance(source, StreamSource)
    return list(source.iterate(epoch))


def contents(samples: list[RawSample]) -> list[Any]:
    return [(s.name.rpartition(":")[2], s.image, s.conditioning_images, s.captions) for s in samples]


def through_pipes(shards: Path, epoch: int) -> list[Any]:
    """What the same shards hold, read by cat."""
    return contents(samples_of(epoch, *(f"pipe:cat {path}" for path in sorted(shards.glob("*.tar")))))


def of_some(faulty: Callable[[Request], bool], fault: Fault) -> Fault:
    return lambda request: fault(request) if faulty(request) else None


def _short(request: Request) -> None:
    """Half of what was asked for, told as such."""
    request.body = request.body[: len(request.body) // 2]
    request.headers["Content-Length"] = str(len(request.body))
    if request.begin is not None and request.body:
        request.claim(request.begin, request.end, int(request.headers["Content-Range"].rpartition("/")[2]))


def _third(request: Request) -> bool:
    return request.number % 3 == 1 and request.begin is not None


FAULTS: dict[str, Fault] = {
    "none": lambda request: None,
    "503": of_some(_third, lambda request: request.fail(503)),
    "429": of_some(_third, lambda request: request.fail(429)),
    "dropped at once": of_some(_third, lambda request: request.drop_after(0)),
    "dropped in the middle": of_some(_third, lambda request: request.drop_after(1000)),
    "always dropped in the middle": lambda request: request.drop_after(9000),
    "shorter ranges": of_some(_third, _short),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost(shards: Path, server: Server, fault: str) -> None:
    server.fault = FAULTS[fault]
    assert contents(samples_of(1, server.address + SHARDS)) == through_pipes(shards, 1)
    assert all(server.requests[path] >= 4 for path in server.objects), "they were read in ranges"


def test_a_range_that_is_answered_with_the_whole_is_asked_for_again(shards: Path, server: Server) -> None:
    server.fault = of_some(_third, lambda request: request.answer_whole(server.objects[request.path]))
    assert contents(samples_of(0, server.address + SHARDS)) == through_pipes(shards, 0)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_server_without_ranges_is_read_from_the_front(
    shards: Path, server: Server, caplog: pytest.LogCaptureFixture, dropped: bool, packed: bool
) -> None:
    """Where it packs what it sends, that is unpacked, and the bytes to skip are counted after."""
    openings = dict.fromkeys(server.objects, 0)

    def whole(request: Request) -> None:
        content = server.objects.get(request.path)
        if content is None:
            return
        request.answer_whole(gzip.compress(content) if packed else content)
        if packed:
            request.headers["Content-Encoding"] = "gzip"
        openings[request.path] += 1
        if dropped and openings[request.path] % 4:
            request.drop_after(len(request.body) // 4 * (openings[request.path] % 4))

    server.fault = whole
    assert contents(samples_of(1, server.address + SHARDS)) == through_pipes(shards, 1)
    told = [record for record in caplog.records if "does not answer with ranges" in record.getMessage()]
    assert 1 <= len(told) <= 2  # for the first sample, and for the epoch


def test_compressed_shards_are_unpacked(tmp_path: Path, shards: Path, server: Server) -> None:
    for path in shards.glob("*.tar"):
        server.objects[f"/{path.name}.gz"] = gzip.compress(path.read_bytes())
    addresses = server.address + "/train-{000..002}.tar.gz"
    assert contents(samples_of(2, addresses)) == through_pipes(shards, 2)


def _raised(address: str, **values: Any) -> str:
    with pytest.raises(
        ValueError, match=r"--train_shards: reading \S+ failed \(.*\)\. Check that it exists"
    ) as refused:
        samples_of(0, address, **values)
    return str(refused.value)


@pytest.mark.parametrize(("status", "words"), [(403, "HTTP 403 Forbidden"), (404, "HTTP 404 Not Found")])
def test_what_will_not_pass_is_told_at_once(server: Server, status: int, words: str) -> None:
    server.fault = lambda request: request.fail(status)
    assert words in _raised(f"{server.address}/train-000.tar?token=SECRET")
    assert server.requests["/train-000.tar"] == 1


def test_what_does_not_pass_is_told_after_some_tries(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.fault = of_some(lambda request: request.path.endswith(".tar"), lambda request: request.fail(503))
    message = _raised(f"{server.address}/train-000.tar?token=SECRET")
    assert "(HTTP 503 Service Unavailable, after 8 tries)" in message
    assert server.requests["/train-000.tar"] == retrying.TRIES
    assert "HTTP 503 Service Unavailable; tried 3 times" in caplog.text
    assert "SECRET" not in caplog.text + message


def _another_etag(request: Request) -> None:
    request.headers["ETag"] = '"two"'


def _another_size(request: Request) -> None:
    assert request.begin is not None
    request.claim(request.begin, request.end, int(request.headers["Content-Range"].rpartition("/")[2]) + 512)


def _another_range(request: Request) -> None:
    assert request.begin is not None
    request.claim(request.begin + 512, request.end + 512, 10**6)


def _more_than_asked(request: Request) -> None:
    assert request.begin is not None
    request.claim(request.begin, request.begin + 10**9, 10**12)


def _huge_size(request: Request) -> None:
    assert request.begin is not None
    request.claim(request.begin, request.end, 10**17)


def _redirect(request: Request) -> None:
    request.fail(302)
    request.headers["Location"] = "file:///etc/passwd"


def _no_number(request: Request) -> None:
    request.headers["Content-Range"] = f"bytes 0-{'9' * 50}/{'9' * 50}"


REFUSED: dict[str, tuple[Fault, str]] = {
    "another object": (_another_etag, "it has changed while it was read"),
    "of another size": (_another_size, "it has changed while it was read: from 133,120 to 133,632 bytes"),
    "another range": (_another_range, r"the server answers with bytes \d+ to \d+ where \d+ to \d+ were asked for"),
    "more than asked for": (_more_than_asked, r"the server answers with bytes \d+ to \d+ where \d+ to"),
    "a number without end": (_no_number, r"answers with the whole object, not with the range .*, after 8 tries"),
    "a redirection to a file": (_redirect, "it redirects to what is no address of the web"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_object_or_a_server_that_changes_is_named(server: Server, case: str) -> None:
    fault, words = REFUSED[case]
    server.fault = of_some(lambda request: (request.begin or 0) > 0, fault)
    assert re.search(words, _raised(f"{server.address}/train-000.tar", max_train_samples=20))


@pytest.mark.parametrize("case", ["another range", "more than asked for", "a redirection to a file"])
def test_so_is_one_that_lies_from_the_first(server: Server, case: str) -> None:
    fault, words = REFUSED[case]
    server.fault = of_some(lambda request: request.path == "/train-000.tar", fault)
    assert re.search(words, _raised(f"{server.address}/train-000.tar"))


def test_an_object_that_claims_a_size_beyond_any_disk_costs_no_more_than_it_has(server: Server) -> None:
    server.fault = of_some(lambda request: request.status == 206, _huge_size)
    assert "HTTP 416 Requested Range Not Satisfiable" in _raised(f"{server.address}/train-000.tar")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_body_without_end_is_left(server: Server, ranges: bool) -> None:
    def endless(request: Request) -> None:
        request.endless = True
        if not ranges:
            request.answer_whole(server.objects[request.path])
        del request.headers["Content-Length"]

    server.objects["/train-000.tar"] = b"x" * 10**5
    server.fault = of_some(lambda request: request.path == "/train-000.tar", endless)
    expected = "it does not begin as a tar does" if ranges else "its server does not tell where it ends"
    assert expected in _raised(f"{server.address}/train-000.tar")
    assert server.bytes["/train-000.tar"] < 2**26


def test_no_more_is_read_than_lies_in_the_window(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(5).randbytes(100 * PIECE)
    server.objects = {"/a": content, "/b": content[: 3 * PIECE]}
    with RemoteStreams([f"{server.address}/a", f"{server.address}/b"]) as streams:
        stream, read = streams.next(), bytearray()
        while len(read) < len(content):
            read += stream.read(PIECE)
            assert server.requests["/a"] <= len(read) // PIECE + read_ahead.RANGES + 1
            if len(read) < 80 * PIECE:
                assert not server.requests["/b"]
        assert read == content
        assert server.requests["/b"], "the next one is on its way before this one's end is asked for"
        assert not stream.read(1)
        assert bytes(streams.next().read(PIECE)) == content[:PIECE]


def test_an_object_that_opens_late_is_whole_though_later_ones_fill_the_window(server: Server) -> None:
    drawn, filled = random.Random(5), threading.Event()
    server.objects = {f"/{name}": drawn.randbytes(20 * PIECE) for name in "abc"}

    def late(request: Request) -> None:
        if request.path == "/b" and request.number == 0:
            filled.wait(20)

    server.fault = late
    with RemoteStreams([f"{server.address}/{name}" for name in "abc"]) as streams:
        for content in server.objects.values():
            stream, read = streams.next(), bytearray()
            while part := stream.read(PIECE):
                read += part
                if len(read) == 16 * PIECE and not filled.is_set():
                    wait_until(lambda: server.bytes["/c"] >= PIECE)
            if not filled.is_set():
                wait_until(lambda: server.requests["/c"] == read_ahead.RANGES - 1)
                filled.set()
            assert read == content


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)  # what was sent is to arrive


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 6 * PIECE) | st.sampled_from([0, 1, PIECE, 2 * PIECE]), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
    count=st.sampled_from([1, 333, PIECE - 1, 10**6]),
    left=st.sampled_from([0.0, 0.5]),
)
def test_the_streams_are_the_objects(server: Server, sizes: list[int], seed: int, count: int, left: float) -> None:
    """With any faults that pass, whatever is left of the streams before."""
    drawn = random.Random(seed)
    server.objects = {f"/{number}": drawn.randbytes(size) for number, size in enumerate(sizes)}
    server.requests.clear()

    def fault(request: Request) -> None:
        kind = (request.number * 7 + seed) % 5
        if kind == 0:
            request.fail(500)
        elif kind == 1 and request.status == 206:
            request.drop_after(len(request.body) // 2)

    server.fault = fault
    with RemoteStreams([f"{server.address}/{number}" for number in range(len(sizes))]) as streams:
        for content in server.objects.values():
            stream, read, wanted = streams.next(), bytearray(), int(len(content) * (1 - left))
            while (part := stream.read(min(count, wanted - len(read)) if left else count)) and len(part) > 0:
                read += part
            assert read == content[:wanted] if left else read == content


def test_the_lanes_end_with_their_reader(server: Server) -> None:
    with RemoteStreams([f"{server.address}/train-000.tar"]) as streams:
        streams.next().read(1)
        lanes = [thread for thread in threading.enumerate() if thread.name.startswith("data-")]
        assert len(lanes) >= read_ahead.RANGES
    for lane in lanes[-read_ahead.RANGES :]:
        lane.join(10)
        assert not lane.is_alive()


def test_a_stream_that_fails_fails_for_whoever_reads_it(server: Server) -> None:
    with RemoteStreams([f"{server.address}/absent"]) as streams:
        stream = streams.next()
        for _ in range(2):
            with pytest.raises(RemoteError, match="HTTP 404 Not Found"):
                stream.read(1)


def test_a_shard_that_ends_too_early_is_called_that(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        server.objects["/train-000.tar"] = tar([("a.jpg", b"I" * 9000)])[:9000]
        assert "it ends too early, in a.jpg" in _raised(f"{server.address}/train-000.tar")
