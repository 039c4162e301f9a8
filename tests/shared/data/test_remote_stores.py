"""An S3-compatible server (moto's, on this machine) through s3fs, with credentials from the environment alone."""

import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from shared.data.remote import RemoteError, RemoteStream, RemoteStreams, open_object, read_ahead, retrying
from shared.data.sample import RawSample
from shared.data.sources import RandomAccessSource, StreamSource, open_source
from shared.data.sources.shard_index import SUFFIX
from shared.prepare_data.command import main
from tests.shared.data.pictures import config, loader, pairs, write_tars

SHARDS = "s3://bucket/train-{000..002}.tar"
PIECE = 20_000


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("shards"), pairs(20)).parent


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """With the shards in it."""
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "SECRET",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retrying, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(read_ahead, "PIECE", PIECE)
    s3fs.S3FileSystem.clear_instance_cache()
    file_system = s3fs.S3FileSystem()
    if not file_system.exists("bucket"):
        file_system.mkdir("bucket")
    for path in shards.iterdir():
        file_system.pipe_file(f"bucket/{path.name}", path.read_bytes())
    yield file_system
    file_system.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def samples_of(*locations: str) -> list[RawSample]:
    source = open_source(config(train_shards=locations, allow_shell_urls=True, shuffle_buffer_size=5))
    assert isinstance(source, StreamSource)
    return list(source.iterate(1))


def contents(samples: list[RawSample]) -> list[Any]:
    return [(s.name.rpartition(":")[2], s.image, s.conditioning_images, s.captions) for s in samples]


def test_a_stream_is_that_of_the_local_shards(bucket: s3fs.S3FileSystem, shards: Path) -> None:
    expected = samples_of(*(f"pipe:cat {path}" for path in sorted(shards.glob("*.tar"))))
    assert contents(samples_of(SHARDS)) == contents(expected)


def test_with_an_index_a_run_is_the_same(bucket: s3fs.S3FileSystem, shards: Path, tmp_path: Path) -> None:
    assert main(["index", SHARDS, "--output_file", f"{tmp_path}/made"]) == 0
    bucket.put_file(f"{tmp_path}/made", f"bucket/train-000.tar{SUFFIX}")
    local, remote = (open_source(config(train_shards=(name,))) for name in (f"{shards}/*.tar", SHARDS))
    assert isinstance(remote, RandomAccessSource)
    assert remote.manifest["fingerprint"] == local.manifest["fingerprint"]
    assert "SECRET" not in json.dumps(remote.manifest)
    expected = loader(config(), source=local)
    for _, (step, batch) in zip(range(3), loader(config(), source=remote).iterate(), strict=False):
        for name, array in expected.batch(step).items():
            np.testing.assert_array_equal(array, batch[name])


def test_faults_are_mended(bucket: s3fs.S3FileSystem, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that s3fs gives up on: a store that is busy, an answer that is too short, silence."""
    asked: list[int] = []
    answers = bucket.cat_file

    def faulty(path: str, **values: Any) -> bytes:
        asked.append(1)
        content = bytes(answers(path, **values))
        match len(asked) % 5:
            case 0:
                raise OSError(errno.EBUSY, "Please reduce your request rate")
            case 1:
                return content[: len(content) // 2]
            case 2:
                raise TimeoutError
        return content

    monkeypatch.setattr(bucket, "cat_file", faulty)  # which fsspec gives to all who ask with the same arguments
    with RemoteStreams([f"s3://bucket/{path.name}" for path in sorted(shards.iterdir())]) as streams:
        for path in sorted(shards.iterdir()):
            assert read_all(streams.next()) == path.read_bytes()
    assert len(asked) > 20


def read_all(stream: RemoteStream) -> bytes:
    read = bytearray()
    while part := stream.read(10**6):
        read += part
    return bytes(read)


def test_an_object_that_is_replaced_is_noticed(bucket: s3fs.S3FileSystem) -> None:
    content = bucket.cat_file("bucket/train-000.tar")
    with RemoteStreams(["s3://bucket/train-000.tar"]) as streams:
        stream = streams.next()
        stream.read(1)
        bucket.pipe_file("bucket/train-000.tar", content[::-1])
        with pytest.raises(RemoteError, match="it has changed while it was read"):
            read_all(stream)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://bucket/absent.tar", "it is not there"),
        ("s3://absent/train-000.tar", "it is not there"),
        ("s3://key:SECRET@bucket/train-000.tar", "ParamValidationError"),
    ],
)
def test_what_will_not_pass_is_told(bucket: s3fs.S3FileSystem, address: str, words: str) -> None:
    with pytest.raises(
        ValueError, match=rf"(reading|looking for) s3://[\w/.-]+ failed \({words}\)\. Check that"
    ) as refused:
        open_source(config(train_shards=(address,)))
    assert "SECRET" not in str(refused.value)


def test_an_empty_object_has_no_samples(bucket: s3fs.S3FileSystem) -> None:
    bucket.pipe_file("bucket/empty.tar", b"")
    opened = open_object("s3://bucket/empty.tar", 10)
    assert opened is not None
    assert (opened.size, opened.beginning) == (0, b"")
    with pytest.raises(ValueError, match="it is empty"):
        open_source(config(train_shards=("s3://bucket/empty.tar",)))


@pytest.mark.parametrize(("scheme", "package"), [("az", "adlfs"), ("oci", "ocifs")])
def test_a_package_that_is_lacking_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"failed \({scheme}: needs a package that is not .*; pip install {package}\)\."
    ):
        open_source(config(train_shards=(f"{scheme}://place/a.tar",)))
