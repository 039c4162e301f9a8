"""Packed shards are what a training makes of the original data, whatever happens on the way."""

import gc
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import webdataset

from shared.data.preprocessing import preprocess
from shared.data.sources import RandomAccessSource, open_source
from shared.prepare_data.command import main
from tests.shared.data.pictures import config, loader, pairs, png, write_image_folder, write_prompt_json, write_tars


def pack(output: Path, *words: object) -> int:
    return main(
        ["pack", "--output_dir", str(output), "--samples_per_shard", "8", "--num_workers", "2", *map(str, words)]
    )


def packed(output: Path) -> Any:
    return config(train_shards=(f"{output}/*.tar",))


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".json")}


def assert_same_batches(one: Any, other: Any) -> None:
    for step in range(3):
        batches = [loader(training).batch(step) for training in (one, other)]
        for name, array in batches[0].items():
            np.testing.assert_array_equal(array, batches[1][name], err_msg=name)


@pytest.mark.parametrize("resolution", [(), ("--resolution", "32")])
@pytest.mark.parametrize("layout", ["image folder", "prompt.json", "shards"])
def test_training_from_packed_shards_is_training_from_the_originals(
    tmp_path: Path, layout: str, resolution: tuple[str, ...]
) -> None:
    samples = pairs()
    samples[3]["text"] = "  blanks around "
    samples[4]["text"] = "Kreis \U0001f534"
    if layout == "shards":
        data = {"train_shards": (str(write_tars(tmp_path / "data", samples)),)}
    else:
        write = write_image_folder if layout == "image folder" else write_prompt_json
        data = {"train_data_dir": str(write(tmp_path / "data", samples))}
    flag, value = next(iter(data.items()))
    given = value if isinstance(value, str) else value[0]
    assert pack(tmp_path / "packed", f"--{flag}", given, *resolution) == 0
    assert_same_batches(config(**data), packed(tmp_path / "packed"))
    assert (tmp_path / "packed" / "000000.tar.shard_index").is_file()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves shards open
def test_webdataset_reads_what_was_packed(tmp_path: Path) -> None:
    samples = pairs(10)
    write_image_folder(tmp_path / "data", samples)
    assert pack(tmp_path / "packed", "--train_data_dir", tmp_path / "data", "--resolution", 16) == 0
    urls = sorted(map(str, (tmp_path / "packed").glob("*.tar")))
    found = list(webdataset.WebDataset(urls, shardshuffle=False))  # not decoded
    gc.collect()
    assert [sample["__key__"] for sample in found] == [f"{number:09d}" for number in range(10)]
    for sample, original in zip(found, samples, strict=True):
        assert sample["text.txt"] == original["text"].encode()
        for column in ("image", "conditioning_image"):
            with PIL.Image.open(io.BytesIO(sample[f"{column}.png"])) as stored:
                np.testing.assert_array_equal(np.asarray(stored), preprocess(original[column], 16, "bilinear"))


def test_pictures_stay_as_they_are_but_for_grey_conditions(tmp_path: Path) -> None:
    outline = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 2, (40, 50), np.uint8) * 255)
    contents: dict[str, bytes] = {}
    for name, picture, form in (
        ("photo.jpg", PIL.Image.open(io.BytesIO(png(0, 50, 40))), "JPEG"),
        ("photo.gif", PIL.Image.open(io.BytesIO(png(0, 50, 40))), "GIF"),
        ("grey.png", outline.convert("RGB"), "PNG"),
        ("one_bit.png", outline.convert("1"), "PNG"),
    ):
        file = io.BytesIO()
        picture.save(file, form)
        contents[name] = file.getvalue()
        (tmp_path / name).write_bytes(contents[name])
    lines = [
        {"image_file_name": image, "conditioning_image_file_name": condition, "text": ["a", "b "]}
        for image, condition in (("photo.jpg", "grey.png"), ("photo.gif", "one_bit.png"))
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert pack(tmp_path / "packed", "--train_data_dir", tmp_path) == 0
    with tarfile.open(tmp_path / "packed" / "000000.tar") as tar:
        stored = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert stored["000000000.image.jpg"] == contents["photo.jpg"]
    assert stored["000000001.conditioning_image.png"] == contents["one_bit.png"], "it is as small already"
    assert json.loads(stored["000000000.text.json"]) == ["a", "b "]
    for name, original in (("000000000.conditioning_image.png", "grey.png"), ("000000001.image.png", "photo.gif")):
        with PIL.Image.open(io.BytesIO(stored[name])) as picture, PIL.Image.open(tmp_path / original) as was:
            assert picture.mode == ("L" if original == "grey.png" else "RGB")
            np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), np.asarray(was.convert("RGB")))


def test_jpeg_is_for_resized_images_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circles = ("--generated_circles", 3)
    assert pack(tmp_path / "a", *circles, "--jpeg_quality", 90) == 2
    assert "--jpeg_quality is about --resolution, which is not given" in capsys.readouterr().err
    assert pack(tmp_path / "a", *circles, "--resolution", 64, "--jpeg_quality", 90) == 0
    with tarfile.open(tmp_path / "a" / "000000.tar") as tar:
        endings = {name.partition(".")[2] for name in tar.getnames()}
    assert endings == {"image.jpg", "conditioning_image.png", "text.txt"}


def test_bad_samples_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = pairs()
    for place in (2, 9, 19):
        samples[place]["conditioning_image"] = b"no picture"
    write_image_folder(tmp_path / "data", samples)
    words = ("--train_data_dir", tmp_path / "data")
    assert pack(tmp_path / "packed", *words, "--max_skipped_samples", 2) == 2
    assert "more than --max_skipped_samples=2 allows" in capsys.readouterr().err
    assert pack(tmp_path / "packed", *words, "--max_skipped_samples", 3) == 0
    said = capsys.readouterr().err
    card = json.loads((tmp_path / "packed" / "packed.json").read_text())
    assert (card["finished"], card["samples"], card["shards"]) == (True, 17, 3)
    assert [one["sample"].rpartition("/")[2] for one in card["left_out"]] == ["0002.png)", "0009.png)", "0019.png)"]
    assert all(f"line {place + 1} " in said for place in (2, 9, 19)), "those of the first call are named again"
    source = open_source(packed(tmp_path / "packed"))
    assert isinstance(source, RandomAccessSource)
    assert {caption for place in range(17) for caption in source.captions(place)} == {
        f"caption {place}" for place in range(20) if place not in (2, 9, 19)
    }


def test_nothing_to_pack_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image_folder(tmp_path / "data", [pair | {"image": b""} for pair in pairs(2)])
    assert pack(tmp_path / "packed", "--train_data_dir", tmp_path / "data") == 2
    assert "holds no sample that can be used" in capsys.readouterr().err


def test_a_stream_is_packed_in_its_order_and_gone_on_with(tmp_path: Path) -> None:
    samples = pairs()
    samples[12]["image"] = b"no picture"
    write_tars(tmp_path / "data", samples, per_shard=20)
    stream = ("--train_shards", f"pipe:cat {tmp_path}/data/*.tar", "--allow_shell_urls")
    assert pack(tmp_path / "packed", *stream, "--max_skipped_samples", 0) == 2
    first = tmp_path / "packed" / "000000.tar"
    made = first.stat().st_ino
    assert [path.name for path in tmp_path.glob("packed/*.tar")] == ["000000.tar"]
    assert pack(tmp_path / "packed", *stream) == 0
    assert first.stat().st_ino == made
    source = open_source(packed(tmp_path / "packed"))
    assert isinstance(source, RandomAccessSource)
    assert [source.captions(place) for place in range(len(source))] == [  # type: ignore[attr-defined]
        (f"caption {place}",) for place in range(20) if place != 12
    ]


def test_another_packing_or_other_files_are_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(tmp_path / "packed", "--generated_circles", 9, "--resolution", 16) == 0
    before = bytes_in(tmp_path / "packed")
    assert pack(tmp_path / "packed", "--generated_circles", 9, "--resolution", 16) == 0
    assert "nothing left to do" in capsys.readouterr().err
    assert pack(tmp_path / "packed", "--generated_circles", 9, "--resolution", 24) == 2
    said = capsys.readouterr().err
    assert "holds another packing: its data was" in said
    assert bytes_in(tmp_path / "packed") == before
    (tmp_path / "packed" / "000001.tar").unlink()
    assert pack(tmp_path / "packed", "--generated_circles", 9, "--resolution", 16) == 0
    assert bytes_in(tmp_path / "packed") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert pack(tmp_path / "other", "--generated_circles", 9) == 2
    assert "is not empty, and holds no packed.json (but thesis.tex)" in capsys.readouterr().err
    (tmp_path / "packed" / "packed.json").write_text('{"finished": 1}')
    assert pack(tmp_path / "packed", "--generated_circles", 9, "--resolution", 16) == 2
    assert "packed.json holds something else than expected" in capsys.readouterr().err


def test_resized_pairs_of_two_shapes_are_what_a_training_makes_of_them(tmp_path: Path) -> None:
    """After resizing nothing tells them from others."""
    samples = pairs(6)
    for place, size in ((1, (40, 80)), (4, (64, 20))):
        samples[place]["conditioning_image"] = png(place, *size)
    data = write_image_folder(tmp_path / "data", samples)
    words = ("--train_data_dir", data, "--resolution", 32)
    assert pack(tmp_path / "skip", *words) == 0
    card = json.loads((tmp_path / "skip" / "packed.json").read_text())
    assert [left_out["sample"].partition(" line ")[2].split()[0] for left_out in card["left_out"]] == ["2", "5"]
    assert all("different shapes" in left_out["reason"] for left_out in card["left_out"])
    for how in ("resize", "crop"):
        for filter_ in ("bilinear", "nearest"):
            output = tmp_path / how / filter_
            assert pack(output, *words, "--mismatched_pairs", how, "--conditioning_interpolation", filter_) == 0
            original = config(train_data_dir=str(data), mismatched_pairs=how, conditioning_interpolation=filter_)
            assert_same_batches(original, packed(output))
    assert pack(tmp_path / "skip", *words, "--mismatched_pairs", "crop") == 2  # another packing
