"""How a host finds out whether it is one of several, and where process 0 listens."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax
import pytest

from flax_trainer.distributed import joining
from flax_trainer.distributed.joining import check_joined, join_processes
from shared.config import TrainConfig

CONFIG = TrainConfig(pretrained_model_name_or_path="model", generated_circles=8)
ON_A_TPU = "tpu,cpu"  # what JAX itself sets where it finds TPU chips


class Started(Exception):
    """With what JAX would have been initialised."""


@pytest.fixture(autouse=True)
def _nothing_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(*arguments: object, **options: object) -> None:
        raise Started(arguments, options["coordinator_bind_address"])

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(joining, "_METADATA", "http://127.0.0.1:9/")  # nobody answers


@pytest.fixture
def tpu_host() -> Iterator[None]:
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", ON_A_TPU)
    yield
    jax.config.update("jax_platforms", before)


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The attributes of a machine on Compute Engine, from a server of its own."""
    attributes: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = attributes.get(self.path.removeprefix("/"))
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(joining, "_METADATA", f"http://127.0.0.1:{server.server_port}/")
    yield attributes
    server.shutdown()
    thread.join()
    server.server_close()


def joins() -> bool:
    try:
        join_processes(CONFIG)
    except Started as started:
        return started.args == ((None, None, None), None)
    return False


def test_flags_say_who_the_others_are() -> None:
    config = TrainConfig(coordinator_address="10.0.0.2:8476", num_processes=4, process_id=3)
    with pytest.raises(Started) as started:
        join_processes(config)
    assert started.value.args == (("10.0.0.2:8476", 4, 3), None), "only process 0 listens"


def listens_at(address: str) -> object:
    config = TrainConfig(coordinator_address=address, num_processes=2, process_id=0)
    with pytest.raises(Started) as started:
        join_processes(config)
    arguments, bind_address = started.value.args
    assert arguments == (address, 2, 0)
    return bind_address


@pytest.fixture
def port() -> int:
    """One that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_process_0_listens_where_it_was_told(port: int, caplog: pytest.LogCaptureFixture) -> None:
    assert listens_at(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
    assert listens_at(f"localhost:{port}") in (f"127.0.0.1:{port}", f"[::1]:{port}")
    assert not caplog.records


@pytest.mark.parametrize("host", ["192.0.2.1", "[2001:db8::1]", "no-such-host.invalid", "a..b", "x" * 70])
def test_an_address_of_no_interface_is_served_on_all_with_a_warning(
    host: str, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert listens_at(f"{host}:{port}") is None
    (record,) = caplog.records
    assert f"{host}:{port}" in record.getMessage()
    assert "all its addresses" in record.getMessage()


def test_a_name_that_means_this_host_only_to_itself_is_served_on_all(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Debian writes a host's own name into /etc/hosts as 127.0.1.1; the others know its address on the network."""
    own = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: own)
    assert listens_at(f"my-host:{port}") is None
    assert "all its addresses" in caplog.text


def test_where_to_listen_can_be_said_to_jax_itself(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"0.0.0.0:{port}")
    assert listens_at(f"127.0.0.1:{port}") is None


def test_a_port_that_is_taken_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = TrainConfig(coordinator_address=address, num_processes=2, process_id=0)
        with pytest.raises(ValueError, match=r"cannot listen on port \d+ of 127.0.0.1 .* another port"):
            join_processes(config)


_LISTENING = """
import sys
from pathlib import Path
from flax_trainer.distributed.joining import join_processes
from shared.config import TrainConfig

port = int(sys.argv[1])
join_processes(TrainConfig(coordinator_address=f"127.0.0.1:{port}", num_processes=1, process_id=0))
sockets = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
print(*(local for _, local, _, state, *_ in sockets if state == "0A" and local.endswith(f":{port:04X}")))
"""


def test_a_real_process_0_is_heard_on_its_loopback_alone(port: int) -> None:
    """127.0.0.1 as Linux lists it, itself or within IPv6."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COORDINATOR_BIND_ADDRESS", None)
    ended = subprocess.run(
        [sys.executable, "-c", _LISTENING, str(port)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    addresses = {local.partition(":")[0] for local in ended.stdout.split()}
    assert addresses in ({"0100007F"}, {"0000000000000000FFFF00000100007F"})


def test_machines_without_a_tpu_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert not joins()


@pytest.mark.usefixtures("tpu_host")
@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_WORKER_HOSTNAMES": "a"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "1"}, False),
    ],
)
def test_environment_of_a_cluster(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], several: bool) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert joins() == several


@pytest.mark.usefixtures("tpu_host")
@pytest.mark.parametrize(
    ("attributes", "several"),
    [
        ({}, False),
        ({"worker-network-endpoints": "unknown:unknown:10.128.0.5"}, False),
        ({"worker-network-endpoints": "unknown:unknown:10.128.0.5,unknown:unknown:10.128.0.6"}, True),
        ({"worker-network-endpoints": "host-0,host-1"}, True),
        ({"worker-network-endpoints": "host-0", "tpu-env": "ZONE: 'us'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
        ({"worker-network-endpoints": "host-0", "tpu-env": "ZONE: 'us'\nMEGASCALE_NUM_SLICES: '1'\n"}, False),
    ],
)
def test_metadata_of_a_tpu_vm(metadata: dict[str, str], attributes: dict[str, str], several: bool) -> None:
    metadata.update(attributes)
    assert joins() == several


@pytest.mark.usefixtures("tpu_host")
def test_metadata_may_be_forbidden(metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    metadata["worker-network-endpoints"] = "host-0,host-1"
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert not joins()


def test_hosts_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_joined()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match=r"belong to 4 hosts.*--coordinator_address, --num_processes and --process_id"):
        check_joined()


def test_others_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: nobody there")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    config = TrainConfig(coordinator_address="10.0.0.2:8476", num_processes=4, process_id=3)
    with pytest.raises(ValueError, match=r"did not find each other \(DEADLINE_EXCEEDED.*Start the same command"):
        join_processes(config)
