"""How large pictures are, told without decoding them: as large as they are when they are decoded."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import webdataset

from shared.data.buckets.picture_sizes import picture_sizes, upright_size
from shared.data.preprocessing import decode
from shared.data.sources import RandomAccessSource, open_source
from tests.shared.data.pictures import config, pairs, write_image_folder, write_prompt_json, write_tars

COUNT = 12
SIZES = [(32, 32), (48, 40), (33, 47), (64, 35)] * 3  # those of `pairs`
ORIENTATION = 0x0112


def file_of(size: tuple[int, int], kind: str, **saving: Any) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, "red").save(file, kind, **saving)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_are_as_large_as_their_pixels_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    content = file_of((40, 24), kind, exif=exif)
    (tmp_path / "picture").write_bytes(content)
    expected = decode(content).size
    assert expected == ((24, 40) if orientation >= 5 else (40, 24))
    assert upright_size(content) == upright_size(tmp_path / "picture") == expected


def saved_by_datasets(folder: Path) -> dict[str, Any]:
    features = datasets.Features(
        {"text": datasets.Value("string"), "image": datasets.Image(), "conditioning_image": datasets.Image()}
    )
    datasets.Dataset.from_list(pairs(COUNT), features=features).save_to_disk(str(folder))
    return {"train_data_dir": str(folder), "load_from_disk": True}


LAYOUTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "folder": lambda folder: {"train_data_dir": str(write_image_folder(folder, pairs(COUNT)))},
    "prompt.json": lambda folder: {"train_data_dir": str(write_prompt_json(folder, pairs(COUNT)))},
    "tars": lambda folder: {"train_shards": (str(write_tars(folder, pairs(COUNT))),)},
    "datasets": saved_by_datasets,
}


def opened(**values: Any) -> RandomAccessSource:
    source = open_source(config(**values))
    assert isinstance(source, RandomAccessSource)
    return source


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_tells_the_same(layout: str, tmp_path: Path) -> None:
    given = LAYOUTS[layout](tmp_path / "data")
    assert [tuple(size) for size in picture_sizes(opened(**given), threads=3)] == SIZES
    source = opened(**given, max_train_samples=5)
    some = picture_sizes(source, threads=1)
    for index, size in enumerate(some):
        assert decode(source[index].picture).size == tuple(size)


def test_circles_tell_theirs_undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.data.sources.circles.draw", None)
    assert [tuple(size) for size in picture_sizes(opened(generated_circles=3), threads=1)] == [(32, 32)] * 3


def test_what_tells_no_size_is_told_apart_and_stops_nothing(tmp_path: Path) -> None:
    """Truncated, no picture, missing, a bomb; and one whose header is longer than most is read to its end."""
    long_header = file_of((80, 48), "JPEG", icc_profile=np.random.default_rng(0).bytes(400_000))
    assert upright_size(long_header[: 128 * 1024]) is None
    bomb = file_of((1, 1), "PNG").replace(b"IHDR" + (1).to_bytes(4, "big") * 2, b"IHDR" + b"\x00\x01\x00\x00" * 2)
    images = [long_header, file_of((40, 24), "PNG")[:20], b"<svg/>", b"", bomb, file_of((40, 24), "PNG")]
    with webdataset.TarWriter(str(tmp_path / "train.tar")) as writer:
        for index, image in enumerate(images):
            members = {"image.png": image} if image else {}
            condition = file_of((40, 24), "PNG")
            writer.write({"__key__": f"{index}", "conditioning_image.png": condition, "text.txt": "a"} | members)
    sizes = picture_sizes(opened(train_shards=(str(tmp_path / "train.tar"),)), threads=2)
    assert sizes.tolist() == [[80, 48], [0, 0], [0, 0], [0, 0], [0, 0], [40, 24]]
    assert upright_size(tmp_path / "missing.png") is None
    assert upright_size(tmp_path) is None


def test_no_more_is_read_than_a_picture_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = file_of((40, 24), "PNG")
    (tmp_path / "picture.png").write_bytes(content)
    monkeypatch.setattr("shared.untrusted.pictures.LARGEST_FILE", len(content))
    assert upright_size(content) == upright_size(tmp_path / "picture.png") == (40, 24)
    monkeypatch.setattr("shared.untrusted.pictures.LARGEST_FILE", len(content) - 1)
    assert upright_size(content) is upright_size(tmp_path / "picture.png") is None
