"""Pictures that are programs, pipes, bombs, or elsewhere."""

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import PIL.EpsImagePlugin
import PIL.Image
import pytest

from shared.data import addresses
from shared.data.addresses import read_address, scheme_of, zip_parts
from shared.data.preprocessing import decode
from shared.data.sample import BadSampleError
from shared.evaluation.validation_images import ValidationImages
from tests.shared.data.hostile_data import UNOPENED, eps_that_writes, in_format
from tests.shared.data.pictures import captions_in, config, loader, pairs, png, write_image_folder, write_tars


@pytest.fixture
def never_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not Ghostscript is installed, Pillow's way to it must not be taken."""

    def refuse(*_given: Any, **_named: Any) -> None:
        raise AssertionError("Ghostscript would have run")

    PIL.Image.init()
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", refuse)
    monkeypatch.setattr(PIL.EpsImagePlugin.EpsImageFile, "_open", refuse)
    with pytest.raises(AssertionError):
        PIL.Image.open(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"))


@pytest.mark.usefixtures("never_eps")
@pytest.mark.parametrize("layout", ["folder", "tars", "DOS"])
def test_a_picture_that_is_a_program_is_skipped(tmp_path: Path, caplog: Any, layout: str) -> None:
    program = eps_that_writes(tmp_path / "canary")
    if layout == "DOS":  # a binary header in front of the program
        program = b"\xc5\xd0\xd3\xc6" + struct.pack("<7I", 32, len(program), 0, 0, 0, 0, 0xFFFF) + program
    samples = pairs(8)
    samples[0]["image"] = samples[1]["conditioning_image"] = program
    if layout == "tars":
        loading = loader(config(train_shards=(str(write_tars(tmp_path / "data", samples)),)))
    else:
        loading = loader(config(train_data_dir=str(write_image_folder(tmp_path / "data", samples))))
    assert len(captions_in(loading.batch(0))) == 8
    assert loading.skipped == 2
    assert caplog.text.count("it is EPS, which is not opened; expected one of PNG, JPEG") == 2
    assert not (tmp_path / "canary").exists()


@pytest.mark.usefixtures("never_eps")
def test_a_validation_image_that_is_a_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(eps_that_writes(tmp_path / "canary"))
    with pytest.raises(ValueError, match=r"--validation_image .*0\.png cannot be used: .*it is EPS"):
        ValidationImages(config(validation_image=(str(tmp_path / "0.png"),), validation_prompt=("a",)))


@pytest.mark.parametrize("kind", UNOPENED)
def test_other_formats_are_named(tmp_path: Path, kind: str) -> None:
    content, reason = UNOPENED[kind]
    with pytest.raises(BadSampleError, match=reason):
        decode(content())
    (tmp_path / "0.png").write_bytes(content())
    with pytest.raises(BadSampleError, match=rf"0\.png cannot be decoded: {reason}"):
        decode(tmp_path / "0.png")


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "AVIF", "JPEG2000"])
def test_what_people_train_on_is_opened(format_: str) -> None:
    assert decode(in_format(format_)).size == (8, 8)


def test_a_camera_jpeg_of_two_frames_is_opened() -> None:
    file, frame = io.BytesIO(), PIL.Image.open(io.BytesIO(png(0, 8, 8)))
    frame.save(file, "MPO", save_all=True, append_images=[frame])
    assert decode(file.getvalue()).size == (8, 8)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "is a named pipe"),
        (os.mkdir, "is a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
)
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path, make: Any, reason: str) -> None:
    path = tmp_path / "0.png"
    make(path)
    with pytest.raises(BadSampleError, match=reason):
        decode(path)
    with pytest.raises(BadSampleError, match=reason):
        decode(f"file://{path}")


def test_every_cut_of_every_format_is_a_picture_or_a_bad_sample() -> None:
    for format_ in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000"):
        content = in_format(format_)
        for length in range(0, len(content), max(1, len(content) // 40)):
            try:
                decode(content[:length])
            except BadSampleError as error:
                assert "\n" not in str(error)  # noqa: PT017


def test_a_bomb_of_text_is_a_bad_sample() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    content = png(0, 8, 8)
    bomb = content[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28))) + content[33:]
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        decode(bomb)


def test_no_memory_for_a_picture_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(_image: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", exhausted)
    with pytest.raises(BadSampleError, match="not enough memory"):
        decode(png(0, 8, 8))


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "ssh://host/a.png",
        "sftp://host/a.png",
        "memory://a.png",
        "reference://a.png",
        "github://a:b@/a.png",
        "dask://a.png",
        "blockcache::https://host/a.png",
        "simplecache::file:///etc/passwd",
        "https://host/a.png::file:///etc/passwd",
        "zip://a.png::ssh://host/a.zip",
        "zip://a.png::zip://b.zip::https://host/c.zip",
        "tar://a.png::/etc/passwd",
        "pipe://cat a.png",
        "://",
        "\0://a",
        "\x1b[2J://a",
    ],
)
def test_only_listed_schemes_are_opened(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses.fsspec, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(BadSampleError, match="expected a file or one of http, https, hf, s3") as refused:
        decode(address)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(("scheme", "package"), [("oci", "ocifs"), ("az", "adlfs"), ("oss", "ossfs")])
def test_a_missing_package_is_named(scheme: str, package: str) -> None:
    with pytest.raises(BadSampleError, match=rf"^{scheme}://bucket/a\.png cannot be read: .*pip install {package}$"):
        decode(f"{scheme}://bucket/a.png?signature=SECRET")


def test_an_address_that_fails_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, _mode: str) -> None:
        raise RuntimeError(f"cannot reach {address}")

    monkeypatch.setattr(addresses.fsspec, "open", refuse)
    with pytest.raises(BadSampleError) as refused:
        decode("https://user:SECRET@host.example/a.png?token=SECRET")
    assert str(refused.value) == "https://host.example/a.png cannot be read: RuntimeError"


class Endless(io.RawIOBase):
    """A server that answers without end, as little as it likes at a time."""

    def read(self, count: int = -1) -> bytes:
        assert count > 0, "read as a whole"
        return bytes(min(count, 2**20))


def test_an_endless_answer_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "LARGEST_FILE", 2**22)
    monkeypatch.setattr(addresses.fsspec, "open", lambda *_: Endless())
    with pytest.raises(BadSampleError, match="has more than 4,194,304 bytes"):
        read_address("https://host.example/a.png")


def test_an_answer_in_small_parts_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.BytesIO):
        def read(self, count: int | None = -1) -> bytes:
            return super().read(min(count or 1, 7))

    monkeypatch.setattr(addresses.fsspec, "open", lambda *_: Slow(png(0, 8, 8)))
    assert read_address("https://host.example/a.png") == png(0, 8, 8)


def test_a_picture_in_a_zip_is_read(tmp_path: Path) -> None:
    """datasets names the pictures of a folder that holds zips so."""
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("sub/0.png", png(0, 8, 8))
        file.writestr("1.png", png(1, 8, 8), zipfile.ZIP_DEFLATED)
        file.writestr("2.png", png(2, 8, 8), zipfile.ZIP_BZIP2)
    assert decode(f"zip://sub/0.png::{archive}").size == (8, 8)
    assert decode(f"zip:///1.png::file://{archive}").size == (8, 8)
    for name, reason in [("2.png", "a method other than deflate"), ("absent.png", "KeyError")]:
        with pytest.raises(BadSampleError, match=reason):
            decode(f"zip://{name}::{archive}")
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(BadSampleError, match="BadZipFile"):
        decode(f"zip://1.png::{archive}")


def test_a_bomb_in_a_zip_is_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "LARGEST_FILE", 2**22)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("0.png", bytes(2**24))
    with pytest.raises(BadSampleError, match="has more than 4,194,304 bytes"):
        decode(f"zip://0.png::{tmp_path / 'a.zip'}")


def test_names_are_told_from_addresses() -> None:
    assert scheme_of("HTTPS://host/a") == "https"
    assert [scheme_of(name) for name in ("a/b://c", "file:///a", "LOCAL://a", "a:b", "C:\\a.png")] == [None] * 5
    assert zip_parts("zip://a::b::c") == ("a", "b::c")


def test_a_file_address_in_a_row_of_a_list_is_a_file(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "data", pairs(4))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[0]["image_file_name"] = f"file://{folder}/image/0000.png"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loading = loader(config(train_data_dir=str(folder)))
    loading.batch(0)
    assert loading.skipped == 0
