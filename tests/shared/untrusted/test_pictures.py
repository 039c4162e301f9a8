"""Pictures of the formats that people train on are opened; everything else is named and left closed."""

import io
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from shared.untrusted.pictures import FORMATS, check_pixels, open_picture

PIXELS = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_of_the_list_is_opened_from_bytes_and_from_files(kind: str, tmp_path: Path) -> None:
    content = encoded(kind)
    path = tmp_path / "picture.wrong_ending"
    path.write_bytes(content)
    for source in (content, path):
        with open_picture(source) as picture:
            assert picture.size == (16, 16)
            picture.load()


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "PCX", "SGI", "TGA"])
def test_other_formats_that_pillow_knows_are_not(kind: str) -> None:
    with pytest.raises(ValueError, match="expected one of PNG, JPEG"):
        open_picture(encoded(kind))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "it is EPS, which is not opened"),
        (b"\xc5\xd0\xd3\xc6" + b"\0" * 40, "it is EPS, which is not opened"),
        (b"%PDF-1.4", "it is PDF"),
        (b"8BPS\x00\x01", "it is PSD"),
        (b'  <svg xmlns="http://www.w3.org/2000/svg">', "it is SVG"),
        (b"\x00\x00\x00\x18ftypheic", "it is of the kind heic"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
        (b"", "it is empty"),
        (b"\x1b[31m forged", "no picture of a known format"),
    ],
)
def test_what_it_is_is_said(content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        open_picture(content)
    assert str(caught.value).isprintable()


def test_eps_is_never_handed_to_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded("EPS")
    PIL.Image.init()
    called: list[str] = []
    factory, accept = PIL.Image.OPEN["EPS"]
    monkeypatch.setitem(PIL.Image.OPEN, "EPS", (lambda *a: called.append("EPS") or factory(*a), accept))
    PIL.Image.open(io.BytesIO(content)).close()
    assert called == ["EPS"], "the reader is not where this test looks"
    with pytest.raises(ValueError, match="EPS"):
        open_picture(content)
    assert called == ["EPS"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(ValueError, match="named pipe"):
        open_picture(tmp_path / "0.png")


def test_more_pixels_than_pillow_warns_of_are_refused() -> None:
    check_pixels(9000, 9000)
    with pytest.raises(ValueError, match="13000x13000 pixels"):
        check_pixels(13_000, 13_000)
    check_pixels(60_000, 1)
    with pytest.raises(ValueError, match="1x89000000 pixels, more than 1,000,000 on a side"):
        check_pixels(1, 89_000_000)
