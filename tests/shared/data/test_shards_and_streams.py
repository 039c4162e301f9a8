import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.gopen import gopen_schemes
from webdataset.tariterators import group_by_keys, tar_file_expander

from shared.data.batches import BatchSpec
from shared.data.sample import RawSample
from shared.data.sources import RandomAccessSource, StreamSource, open_source
from shared.data.sources.huggingface import HuggingFaceStream
from shared.data.sources.shard_keys import shard_keys, split_member
from shared.data.sources.shard_locations import expand
from shared.data.sources.shards import ShardSource
from shared.data.sources.shuffling import buffered_shuffle
from tests.shared.data.pictures import (
    captions_in,
    config,
    loader,
    pairs,
    png,
    write_image_folder,
    write_prompt_json,
    write_tars,
)
from tests.shared.data.remote_server import Server, running_server


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as served:
        yield served


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def piped(folder: Path, **values: Any) -> Any:
    """The shards of `folder` as a source that can only be streamed."""
    shards = tuple(f"pipe:cat {path}" for path in sorted(folder.glob("*.tar")))
    return config(train_shards=shards, allow_shell_urls=True, **values)


# Local tars


MEMBER_NAMES = st.lists(
    st.from_regex(r"(d\.x/|dir/|__meta__/|)(__k__|[ab]{1,2}|\.a|)(\.|)(image\.png|Cond\.PNG|txt|pyd)", fullmatch=True),
    min_size=1,
    max_size=10,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(names=MEMBER_NAMES)
def test_the_index_groups_members_as_webdataset_does(
    names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    # A complete first sample, so that the keys can be told.
    names = ["first.image.png", "first.cond.png", "first.txt", *names]
    write_tar(path, [(name, name.encode()) for name in names])
    with path.open("rb") as file:
        members = tar_file_expander([{"url": str(path), "stream": file}])
        expected = [(s["__key__"], s.get("image.png"), s.get("cond.png"), s.get("txt")) for s in group_by_keys(members)]

    source = ShardSource([path], shard_keys("image.png", ("cond.png",), "txt"))
    found = [source[index] for index in range(len(source))]
    assert [
        (s.name.split(":")[-1], s.image, *s.conditioning_images, s.captions[0].encode() if s.captions else None)
        for s in found
    ] == expected


def test_members_split_at_the_first_dot() -> None:
    assert split_member("a/b.c.D") == ("a/b", "c.d")
    assert split_member("x.y/b.txt") == ("x.y/b", "txt")
    assert split_member(".hidden") is None
    assert split_member("plain") is None
    assert split_member("__m__/a.txt") is None


@pytest.mark.parametrize(
    ("image", "conditioning", "caption"),
    [
        ("image.png", "conditioning_image.png", "text.txt"),
        ("jpg", "cond.png", "txt"),
        ("webp", "conditioning.png", "caption"),
        ("png", "source.png", "json"),
        ("target.jpeg", "source.jpeg", "prompt.txt"),
        ("JPG", "Condition.PNG", "TXT"),
    ],
)
def test_usual_keys_are_found(tmp_path: Path, image: str, conditioning: str, caption: str) -> None:
    text = b'{"caption": ["hello"]}' if caption == "json" else b"hello\n"
    write_tar(tmp_path / "a.tar", [(f"0001.{image}", b"I"), (f"0001.{conditioning}", b"C"), (f"0001.{caption}", text)])
    (sample,) = open_source(config(train_shards=(str(tmp_path / "a.tar"),)))
    assert (sample.image, sample.conditioning_images, sample.captions) == (b"I", (b"C",), ("hello",))


@pytest.mark.parametrize("stream", [False, True])
def test_given_keys_win_and_may_have_alternatives(tmp_path: Path, stream: bool) -> None:
    members = [
        ("1.jpg", b"wrong"),
        ("1.b.png", b"I"),
        ("1.edge.png", b"C"),
        ("1.txt", b"wrong"),
        ("1.long.txt", b"right"),
    ]
    write_tar(tmp_path / "a.tar", members)
    keys = {
        "shards_image_key": "a.png;B.png",
        "shards_conditioning_key": ("edge.png",),
        "shards_caption_key": "long.txt",
    }
    if stream:
        sample = next(open_source(piped(tmp_path, **keys)).iterate(0))  # type: ignore[union-attr]
    else:
        (sample,) = open_source(config(train_shards=(str(tmp_path / "a.tar"),), **keys))
    assert (sample.image, sample.conditioning_images, sample.captions) == (b"I", (b"C",), ("right",))


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_keys_are_listed(tmp_path: Path, stream: bool) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b""), ("1.edges.png", b""), ("1.words", b"")])
    training = piped(tmp_path) if stream else config(train_shards=(str(tmp_path / "a.tar"),))
    with pytest.raises(
        ValueError, match=r"has the keys edges\.png, jpg, words, .*set --shards_conditioning_key, --shards_caption_key"
    ):
        open_source(training)


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ({"text": "a"}, ("a",)),
        ({"caption": ["a", "b"]}, ("a", "b")),
        ({"prompt": "a", "text": "first"}, ("first",)),
        ("a", ("a",)),
        ({"title": "a"}, ()),
        ({"text": 3}, ()),
    ],
)
def test_json_captions(tmp_path: Path, value: Any, captions: tuple[str, ...]) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b""), ("1.cond.png", b""), ("1.json", json.dumps(value).encode())])
    (sample,) = open_source(config(train_shards=(str(tmp_path / "a.tar"),)))
    assert sample.captions == captions


def test_patterns(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "b-0.tar"):
        (tmp_path / name).touch()
    found = list(
        expand([f"{tmp_path}/a-{{0..1}}.tar", f"{tmp_path}/b*.tar", f"file:{tmp_path}/a-0.tar", "gs://x/{1,2}"])
    )
    names = ["a-0.tar", "a-1.tar", "b-0.tar", "a-0.tar"]
    assert found == [*(str(tmp_path / name) for name in names), "gs://x/1", "gs://x/2"]
    with pytest.raises(
        ValueError, match=r"no file '.*c-0\.tar' \(from '.*c-\{0\.\.3\}\.tar'\); give existing \.tar files"
    ):
        list(expand([f"{tmp_path}/c-{{0..3}}.tar"]))


def test_damaged_and_empty_tars_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"a\.tar cannot be read as an uncompressed tar"):
        open_source(config(train_shards=(str(tmp_path / "a.tar"),)))
    write_tar(tmp_path / "b.tar", [])
    with pytest.raises(ValueError, match="hold no samples"):
        open_source(config(train_shards=(str(tmp_path / "b.tar"),)))
    write_tar(tmp_path / "c.tar", [("1.jpg", b""), ("1.jpg", b"")])
    with pytest.raises(ValueError, match=r"holds '1\.jpg' twice"):
        open_source(config(train_shards=(str(tmp_path / "c.tar"),)))
    with pytest.raises(ValueError, match=r"--train_shards: reading .* failed"):
        open_source(config(train_shards=(f"pipe:cat {tmp_path}/absent.tar 2>/dev/null",), allow_shell_urls=True))


def test_a_command_that_fails_after_a_whole_tar_is_an_error(tmp_path: Path) -> None:
    """A cut connection can end between two members, where a tar shows no damage."""
    write_tars(tmp_path, pairs(2))
    training = config(train_shards=(f"pipe:cat {tmp_path}/*.tar; exit 3",), allow_shell_urls=True)
    with pytest.raises(ValueError, match=r"reading pipe:cat … \(sha256 \w{8}\) failed \(OSError\)\. Check that it"):
        list(open_source(training).iterate(0))  # type: ignore[union-attr]


FAILURES = {
    "no such file": "cat {folder}/absent.tar 2>/dev/null",
    "fails at the end": "cat {folder}/train-000.tar; exit 3",
    "fails at once": "exit 4",
    "no such program": "no-such-program-at-all 2>/dev/null",
    "nothing": "true",
    "no tar": "echo nonsense",
    "cut off": "head -c 1000 {folder}/train-000.tar",
    "twice the same": "cat {folder}/twice.tar",
    "other keys": "cat {folder}/keys.tar",
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("secret", [": 'Bearer SECRET'; ", "TOKEN=SECRET; ", "TOKEN='a SECRET' "])
def test_a_command_that_fails_is_not_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, failure: str, secret: str
) -> None:
    write_tars(tmp_path, pairs(2))
    members = [("1.jpg", b"I"), ("1.cond.png", b"C"), ("1.txt", b"text"), ("1.jpg", b"I")]
    write_tar(tmp_path / "twice.tar", members)
    write_tar(tmp_path / "keys.tar", [("1.foo", b"")])
    training = config(
        train_shards=(f"pipe:{secret}{FAILURES[failure].format(folder=tmp_path)}",), allow_shell_urls=True
    )
    with pytest.raises(ValueError) as refused:  # noqa: PT011  whichever it is
        list(open_source(training).iterate(0))  # type: ignore[union-attr]
    error: BaseException | None = refused.value
    while error is not None:  # what a traceback would show
        assert "SECRET" not in "".join(map(str, error.args))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert "SECRET" not in caplog.text


def test_a_streams_manifest_and_samples_hold_no_secret(tmp_path: Path) -> None:
    write_tars(tmp_path, pairs(16))
    commands = [f"pipe:cat {tmp_path}/train-{shard:03d}.tar # Bearer SECRET" for shard in range(2)]
    training = config(train_shards=tuple(commands), allow_shell_urls=True)
    source = open_source(training)
    assert isinstance(source, StreamSource)
    assert "SECRET" not in json.dumps(source.manifest)
    assert len(set(source.manifest["location"])) == 2, "commands can still be told apart"
    assert source.manifest == open_source(training).manifest
    samples = list(source.iterate(0))
    assert len({sample.name for sample in samples}) == 16
    assert not any("SECRET" in sample.name for sample in samples)


def test_a_bad_sample_of_a_command_is_named_without_the_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = pairs(8)
    samples[3] = samples[3] | {"image": b"not an image"}
    write_tars(tmp_path, samples)
    shards = (f"pipe:cat {tmp_path}/train-000.tar # SECRET",)
    loading = loader(config(train_shards=shards, allow_shell_urls=True))
    loading.batch(0)
    assert loading.skipped == 1
    assert ":0003: " in caplog.text
    with pytest.raises(ValueError, match="more than --max_skipped_samples=0 allows") as refused:
        loader(config(train_shards=shards, allow_shell_urls=True, max_skipped_samples=0)).batch(0)
    assert "SECRET" not in caplog.text + str(refused.value)


def test_an_address_with_password_and_query_shows_neither(tmp_path: Path, server: Server) -> None:
    write_tars(tmp_path, pairs(2))
    server.objects["/train-000.tar"] = (tmp_path / "train-000.tar").read_bytes()
    host = server.address.removeprefix("http://")
    address = f"http://user:SECRET@{host}/train-000.tar?signature=SECRET"
    source = open_source(config(train_shards=(address,)))
    assert isinstance(source, StreamSource)
    assert source.manifest["location"] == [f"http://{host}/train-000.tar"]
    assert [sample.name for sample in source.iterate(0)] == [
        f"http://{host}/train-000.tar:{index:04d}" for index in range(2)
    ]
    with pytest.raises(
        ValueError, match=r"reading http://127\.0\.0\.1:\d+/absent\.tar failed \(HTTP 404 Not Found\)"
    ) as no:
        open_source(config(train_shards=(address.replace("train-000", "absent"),)))
    assert "SECRET" not in str(no.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("ftp://user:SECRET@host/{0..3}.tar?x=SECRET", r"'ftp://host/0\.tar', and ftp: cannot be read"),
        ("simplecache::s3://key:SECRET@bucket/a.tar", r"'simplecache::s3://bucket/a\.tar', and simplecache: cannot"),
        ("https://user:SECRET@host/a.zip::file:///etc/passwd", "and https: cannot be read"),
        ("gopher:a.tar", "and gopher: cannot be read"),
        ("PIPE:curl SECRET", r"'pipe:curl … \(sha256 \w{8}\)', and PIPE: cannot be read"),
        ("https://user:SECRET@host/{000..9.tar", r"the braces of 'https://host/{000\.\.9\.tar' do not match"),
    ],
)
def test_an_address_that_cannot_be_read_is_refused_by_name(address: str, shown: str) -> None:
    with pytest.raises(ValueError, match=shown) as refused:
        open_source(config(train_shards=("https://host.example/first.tar", address), allow_shell_urls=True))
    assert "SECRET" not in str(refused.value)


def test_an_unknown_scheme_names_those_that_fsspec_and_webdataset_read() -> None:
    with pytest.raises(ValueError, match="expected paths or one of ") as refused:
        open_source(config(train_shards=("ftp://host/a.tar",)))
    message = str(refused.value)
    named = set(message.partition("one of ")[2].partition(": (")[0].split(", "))
    assert {"pipe", "http", "https", "gs", "hf", "s3"} <= named
    assert named - {"abfss"} <= {*fsspec.available_protocols(), *gopen_schemes}  # adlfs makes abfss known
    assert "'pipe:rclone cat ADDRESS'" in message


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "pth", "npy"])
def test_no_pickle_is_ever_loaded(tmp_path: Path, extension: str, stream: bool) -> None:
    payload = pickle.dumps(Exploit(tmp_path / "pwned"))
    members = {
        "image.png": png(0, 8, 8),
        "conditioning_image.png": png(1, 8, 8),
        "text.txt": b"fine",
        extension: payload,
    }
    write_tar(tmp_path / "a.tar", [(f"1.{name}", content) for name, content in members.items()])
    training = piped(tmp_path) if stream else config(train_shards=(str(tmp_path / "a.tar"),))
    assert captions_in(loader(training).batch(0)) == ["fine"] * 8
    assert not (tmp_path / "pwned").exists()
    pickle.loads(payload)
    assert (tmp_path / "pwned").exists()  # the payload does work


@pytest.mark.parametrize("scheme", ["pipe", "PIPE", "Pipe", "{a.tar,pipe"])
def test_shell_urls_need_their_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    command = f"{scheme}:touch ran; echo SECRET" + "}" * scheme.count("{")
    with pytest.raises(ValueError, match=r"which runs a shell command; add --allow_shell_urls if you trust it") as no:
        open_source(config(train_shards=(command,)))
    assert "SECRET" not in str(no.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux alone says what a process has read")
def test_hosts_together_read_each_body_of_local_tars_once(tmp_path: Path) -> None:
    samples = [{"image": png(i, 99, 99), "conditioning_image": png(50 + i, 99, 99), "text": str(i)} for i in range(32)]
    training = config(train_shards=(str(write_tars(tmp_path, samples)),), resolution=8)
    whole = sum(path.stat().st_size for path in tmp_path.iterdir())
    loader(training).batch(0)  # which imports, too
    opened, read = [], []
    for host in range(4):
        before = bytes_read()
        loading = loader(training, BatchSpec(4, 4, 2), host, 4)
        opened.append(bytes_read() - before)
        loading.batch(0)
        read.append(bytes_read() - before - opened[-1])
    assert max(opened) < whole / 10, "the headers alone"
    assert 0.9 * whole < sum(read) < 1.1 * whole


def bytes_read() -> int:
    """By this process so far, as the kernel counts it."""
    return int(Path("/proc/self/io").read_text().split()[1])


# Streams


@settings(max_examples=60)
@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 2**32), st.integers(0, 9))
def test_a_buffer_yields_everything_once_in_an_order_of_its_seed_and_epoch(
    count: int, size: int, seed: int, epoch: int
) -> None:
    order = list(buffered_shuffle(range(count), size, seed, epoch))
    assert sorted(order) == list(range(count))
    assert order == list(buffered_shuffle(range(count), size, seed, epoch))
    assert all(item - place < size for place, item in enumerate(order))
    if count > 15 and size > 10:
        assert order != list(buffered_shuffle(range(count), size, seed, epoch + 1))


def streamed_tars(folder: Path, **values: Any) -> Any:
    write_tars(folder, pairs())
    return piped(folder, **values)


def compressed_tars(folder: Path, **values: Any) -> Any:
    write_tars(folder, pairs())
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as plain, tarfile.open(f"{path}.gz", "w:gz") as packed:
            for member in plain:
                packed.addfile(member, plain.extractfile(member))
    return config(train_shards=(str(folder / "*.tar.gz"),), **values)


def streamed_image_folder(folder: Path, **values: Any) -> Any:
    return config(train_data_dir=str(write_image_folder(folder, pairs())), streaming=True, **values)


def streamed_parquet(folder: Path, **values: Any) -> Any:
    folder.mkdir()
    for shard in range(3):
        datasets.Dataset.from_list(pairs()[shard::3]).to_parquet(folder / f"train-{shard}.parquet")
    return config(dataset_name=str(folder), streaming=True, **values)


STREAMS = [streamed_tars, compressed_tars, streamed_parquet, streamed_image_folder]


@pytest.fixture(params=STREAMS)
def streamed(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A configuration whose source is a stream of the twenty pictures."""
    return request.param(tmp_path / "data", shuffle_buffer_size=5)


def test_an_epoch_of_a_stream_has_every_sample_once_and_its_own_order(streamed: Any) -> None:
    source = open_source(streamed)
    assert isinstance(source, StreamSource)
    assert json.loads(json.dumps(source.manifest)) == source.manifest
    epochs = [[sample.captions for sample in source.iterate(epoch)] for epoch in (0, 1, 0)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted((f"caption {index}",) for index in range(20))
    assert epochs[0] == epochs[2] != epochs[1]
    assert epochs[0] == [sample.captions for sample in open_source(streamed).iterate(0)]  # type: ignore[union-attr]


def test_a_stream_resumes_exactly_and_without_decoding(streamed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uninterrupted = [batch for _, (_, batch) in zip(range(8), loader(streamed).iterate(), strict=False)]
    decoded: list[int] = []
    import shared.data.decoded_pairs as decoded_pairs

    decode = decoded_pairs.decode_picture
    monkeypatch.setattr(decoded_pairs, "decode_picture", lambda *given: decoded.append(1) or decode(*given))
    resumed = loader(streamed)
    for step in (5, 6, 7, 2):  # and back
        for name, array in resumed.batch(step).items():
            np.testing.assert_array_equal(array, uninterrupted[step][name])
    assert len(decoded) == 4 * 8 * 2


def test_a_stream_is_the_same_for_every_split(streamed: Any) -> None:
    expected = loader(streamed).batch(3)
    threaded = config(**vars(streamed) | {"dataloader_num_workers": 3})
    for host in range(2):
        loading = loader(threaded, BatchSpec(2, 2, 2), host, 2)
        got = next(loading.iterate(3))[1]
        loading.close()
        for name, array in got.items():
            merged = expected[name].reshape(2, 4, *expected[name].shape[2:])
            np.testing.assert_array_equal(array, merged[:, host * 2 : host * 2 + 2])


def test_a_stream_takes_the_same_samples_every_epoch(streamed: Any) -> None:
    source = open_source(config(**vars(streamed) | {"max_train_samples": 6}))
    epochs = [sorted(sample.captions for sample in source.iterate(epoch)) for epoch in range(3)]  # type: ignore[union-attr]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(epochs[0]) == 6


class MemoryStream:
    """A stream whose epochs end at once, or hold bad samples at both ends."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.manifest: dict[str, Any] = {"location": "memory"}

    def iterate(self, epoch: int) -> Any:
        image = png(0, 8, 8)
        return (RawSample(None if name.startswith("bad") else image, (image,), (name,), name) for name in self.names)


def test_a_bad_sample_of_a_stream_gives_its_place_to_the_next() -> None:
    loading = loader(config(resolution=8, max_skipped_samples=1), BatchSpec(6), source=MemoryStream(["a", "bad", "b"]))
    assert captions_in(loading.batch(0)) == ["a", "b", "b", "a", "b", "b"]
    assert loading.skipped == 1


def test_bad_samples_on_both_sides_of_an_epochs_end_are_within_the_limit() -> None:
    names = ["bad 1", "bad 2", "a", "bad 3"]
    loading = loader(config(resolution=8, max_skipped_samples=3), BatchSpec(8), source=MemoryStream(names))
    assert captions_in(loading.batch(0)) == ["a"] * 8


def test_an_empty_stream_is_an_error() -> None:
    with pytest.raises(ValueError, match="memory holds no samples"):
        loader(config(resolution=8), source=MemoryStream([])).batch(0)


def test_a_stream_without_the_column_is_named(tmp_path: Path) -> None:
    training = streamed_parquet(tmp_path / "data", caption_column="words")
    with pytest.raises(
        ValueError, match=r"--caption_column is 'words', but .* has the columns image, conditioning_image, text"
    ):
        open_source(training)


def test_an_image_folder_that_is_to_be_streamed_is_opened_through_datasets(tmp_path: Path) -> None:
    training = streamed_image_folder(tmp_path / "data")
    source = open_source(training)
    assert isinstance(source, HuggingFaceStream)
    assert (source.manifest["kind"], source.manifest["location"]) == ("huggingface_stream", training.train_data_dir)
    samples = {sample.captions[0]: sample for sample in source.iterate(0)}
    for pair in pairs():
        sample = samples[pair["text"]]
        assert encoded(sample.image) == pair["image"]
        assert encoded(sample.conditioning_images[0]) == pair["conditioning_image"]
    at_random = open_source(config(**vars(training) | {"streaming": False}))
    assert isinstance(at_random, RandomAccessSource)
    assert at_random.manifest["kind"] == "image_folder"


def encoded(image: Any) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def test_a_folder_to_be_streamed_must_still_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which is not a folder"):
        open_source(config(train_data_dir=str(tmp_path / "absent"), streaming=True))
    with pytest.raises(ValueError, match="which is empty"):
        open_source(config(train_data_dir=str(tmp_path), streaming=True))


def test_a_prompt_json_folder_is_no_stream(tmp_path: Path) -> None:
    """To datasets it would be a folder of images, whose labels are the names of their folders."""
    training = config(train_data_dir=str(write_prompt_json(tmp_path / "data", pairs())), streaming=True)
    with pytest.raises(ValueError, match=r"does not know the prompt\.json of .*leave --streaming out"):
        open_source(training)
