"""Several conditions of a sample, side by side in channels, from wherever the samples come."""

import io
import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest

from shared.config import TrainConfig
from shared.config.validation import check_sources
from shared.data.batches import BatchSpec
from shared.data.decoded_pairs import PairDecoder
from shared.data.preprocessing import decode
from shared.data.sample import BadSampleError
from shared.data.sources import RandomAccessSource, open_source
from shared.data.sources.shard_index import PREFIX, SUFFIX
from shared.data.sources.shard_keys import shard_keys
from shared.prepare_data.cache.making import make_cache
from shared.prepare_data.command import main
from shared.prepare_data.members import Storing, members_of
from tests.shared.data.index_corruptions import run_cases
from tests.shared.data.pictures import captions_in, config, loader
from tests.shared.data.several import (
    CHANNELS,
    COLUMNS,
    samples,
    write_dataset,
    write_image_folder,
    write_prompt_json,
    write_tars,
)
from tests.shared.prepare_data.cache.test_making import DEMO_MODEL, Backend, of_cache

KEYS = tuple(f"{column}.png" for column in COLUMNS)
PACKED_KEYS = ("conditioning_image_1.png", "conditioning_image_2.png")


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def in_folder(folder: Path, **changes: Any) -> TrainConfig:
    settings = {"conditioning_image_column": COLUMNS, "conditioning_channels": CHANNELS, "train_data_dir": str(folder)}
    return config(**(settings | changes))


def in_shards(pattern: object, keys: tuple[str, ...] = KEYS, **changes: Any) -> TrainConfig:
    settings = {"conditioning_channels": CHANNELS, "shards_conditioning_key": keys, "train_shards": (str(pattern),)}
    return config(**(settings | changes))


def indexed(folder: Path) -> TrainConfig:
    pattern = write_tars(folder, samples())
    assert main(["index", str(pattern), "--shards_conditioning_key", *KEYS, "--num_workers", "0"]) == 0
    return in_shards(pattern)


def packed(folder: Path, *words: str) -> TrainConfig:
    """From the shards, as they are or resized."""
    data = ["--train_shards", str(write_tars(folder / "data", samples())), "--shards_conditioning_key", *KEYS]
    assert main(["pack", *data, "--output_dir", str(folder / "packed"), "--num_workers", "0", *words]) == 0
    return in_shards(folder / "packed" / "*.tar", PACKED_KEYS)


LAYOUTS: dict[str, Callable[[Path], TrainConfig]] = {
    "prompt.json": lambda folder: in_folder(write_prompt_json(folder, samples())),
    "save_to_disk": lambda folder: in_folder(write_dataset(folder, samples()), load_from_disk=True),
    "tars": lambda folder: in_shards(write_tars(folder, samples())),
    "indexed tars": indexed,
    "packed": packed,
}


def resized(picture: bytes, mode: str, side: int) -> Any:
    """As Pillow has it, of a square picture."""
    with PIL.Image.open(io.BytesIO(picture)) as image:
        opened = image
        if image.mode.startswith("I"):
            opened = PIL.Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
        pixels = np.asarray(opened.convert(mode).resize((side, side), PIL.Image.Resampling.BILINEAR))
    return pixels.reshape(side, side, -1).astype(int)


def test_channels_are_those_of_each_picture_in_the_order_of_the_columns(tmp_path: Path) -> None:
    square = samples()[::4]
    batch = loader(in_folder(write_image_folder(tmp_path, square)), BatchSpec(5)).batch(0)
    assert batch["conditioning_pixel_values"].shape == (1, 5, 32, 32, 4)
    for caption, pixels in zip(captions_in(batch), batch["conditioning_pixel_values"][0], strict=True):
        (sample,) = (sample for sample in square if sample["text"] == caption)
        expected = np.concatenate([resized(sample["depth"], "L", 32), resized(sample["canny"], "RGB", 32)], axis=-1)
        assert np.abs(pixels - expected).max() <= 1
    turned = in_folder(tmp_path, conditioning_image_column=COLUMNS[::-1], conditioning_channels=(3, 1))
    expected_RRN = np.roll(batch["conditioning_pixel_values"], -1, axis=-1)
    np.testing.assert_array_equal(loader(turned, BatchSpec(5)).batch(0)["conditioning_pixel_values"], expected_RRN)


def test_one_number_of_channels_is_that_of_each(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path, samples(8))
    both = in_folder(folder, conditioning_channels=(3, 3))
    assert in_folder(folder, conditioning_channels=(3,)).channels_of_conditions == (3, 3)
    batches = [loader(made).batch(0) for made in (both, in_folder(folder, conditioning_channels=(3,)))]
    assert batches[0]["conditioning_pixel_values"].shape[-1] == 6
    np.testing.assert_array_equal(*(batch["conditioning_pixel_values"] for batch in batches))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_batches(layout: str, tmp_path: Path) -> None:
    """Cropped and mirrored together, wherever that is drawn."""
    changes = {"random_crop": True, "random_flip": True}
    expected = loader(in_folder(write_image_folder(tmp_path / "reference", samples()), **changes))
    given = loader(config(**(vars(LAYOUTS[layout](tmp_path / "data")) | changes)))
    for step in range(3):
        for name, array in expected.batch(step).items():
            np.testing.assert_array_equal(given.batch(step)[name], array, err_msg=name)


def test_resized_shards_are_what_a_training_makes_of_the_originals(tmp_path: Path) -> None:
    given = loader(packed(tmp_path / "data", "--resolution", "32"))
    expected = loader(in_folder(write_image_folder(tmp_path / "reference", samples())))
    for name in ("pixel_values", "conditioning_pixel_values"):
        np.testing.assert_array_equal(given.batch(0)[name], expected.batch(0)[name])


def test_packed_conditions_have_one_name_whatever_they_were(tmp_path: Path) -> None:
    made = samples(1)
    with PIL.Image.open(io.BytesIO(made[0]["canny"])) as image:
        image.save(file := io.BytesIO(), "JPEG")
    made[0]["canny"] = file.getvalue()
    (original,) = open_source(in_folder(write_image_folder(tmp_path, made)))  # type: ignore[misc]
    members = members_of(original, Storing(None, None))
    assert members.keys() == {"image.png", *PACKED_KEYS, "text.txt"}
    for name, column in zip(PACKED_KEYS, COLUMNS, strict=True):
        assert decode(members[name]).tobytes() == decode(made[0][column]).tobytes()


def test_a_stream_has_the_same_samples(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", samples())
    shards = tuple(f"pipe:cat {path}" for path in sorted((tmp_path / "tars").iterdir()))
    piped = in_shards("", train_shards=shards, allow_shell_urls=True)
    source = open_source(in_shards(tmp_path / "tars" / "*.tar"))
    assert isinstance(source, RandomAccessSource)
    streamed = {sample.captions: sample for sample in open_source(piped).iterate(0)}  # type: ignore[union-attr]
    assert len(streamed) == 20
    for sample in (source[place] for place in range(20)):
        found = streamed[sample.captions]
        assert (found.image, found.conditioning_images) == (sample.image, sample.conditioning_images)
        assert len(found.conditions) == 2


def test_a_cache_keeps_both(tmp_path: Path) -> None:
    plain = in_folder(
        write_image_folder(tmp_path / "data", samples()),
        pretrained_model_name_or_path=str(DEMO_MODEL),
        output_dir=str(tmp_path / "cached"),
    )
    make_cache(plain, "flax", Backend().open)
    with pytest.raises(ValueError, match=r"made with --conditioning_channels 1 3, and this run has 3: give"):
        open_source(of_cache(tmp_path / "cached"))
    cached = of_cache(tmp_path / "cached", seed=plain.seed, conditioning_channels=CHANNELS)
    check_sources(cached)
    expected, given = loader(plain).batch(1), loader(cached).batch(1)
    np.testing.assert_array_equal(given["conditioning_pixel_values"], expected["conditioning_pixel_values"])
    assert captions_in(given) == captions_in(expected)


def test_a_sample_that_lacks_a_condition_is_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = samples(8)
    del made[3]["canny"]
    for training in (
        in_folder(write_image_folder(tmp_path / "folder", made)),
        in_shards(write_tars(tmp_path / "tars", made)),
    ):
        loading = loader(training)
        with caplog.at_level(logging.WARNING):
            assert "caption 3" not in captions_in(loading.batch(0))
        assert loading.skipped == 1
        assert "it has no conditioning image 2 of 2" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("other", COLUMNS)
def test_each_condition_is_held_against_the_image(other: str, tmp_path: Path) -> None:
    made = samples(4)
    made[0][other] = samples(4)[1][other]
    source = open_source(in_folder(write_image_folder(tmp_path, made)))
    assert isinstance(source, RandomAccessSource)
    number = COLUMNS.index(other) + 1
    decode = PairDecoder(in_folder(tmp_path))
    with pytest.raises(BadSampleError, match=rf"its image has 64x64 pixels and its condition {number} \d+x\d+, which"):
        decode(source[0])
    assert decode.mismatched == 1
    for how in ("resize", "crop"):
        pair = PairDecoder(in_folder(tmp_path, mismatched_pairs=how))(source[0])
        assert pair.conditioning_pixels.shape == (32, 32, 4)


def test_what_is_prepared_is_looked_through(tmp_path: Path) -> None:
    made = samples(6)
    made[2]["canny"] = made[3]["canny"]
    made[4] |= {"image": made[0]["image"], "depth": made[0]["depth"]}  # another one, for its other condition
    made[5] = made[1] | {"text": "the same pictures"}
    data = ["--train_data_dir", str(write_image_folder(tmp_path, made)), "--conditioning_image_column", *COLUMNS]
    assert main(["check", *data, "--resolution", "32", "--report", str(tmp_path / "report.json")]) == 1
    faults = json.loads((tmp_path / "report.json").read_text())
    assert [(fault["kind"], fault["sample"].partition(" line ")[2].split()[0]) for fault in faults] == [
        ("mismatched", "3"),
        ("duplicated", "6"),
    ]
    assert "its condition 2 64x36" in faults[0]["detail"]
    assert main(["show", *data, "--num_samples", "2", "--output_file", str(tmp_path / "a.png")]) == 0
    one = ["--train_data_dir", str(tmp_path), "--conditioning_image_column", "canny"]
    assert main(["show", *one, "--num_samples", "2", "--output_file", str(tmp_path / "b.png")]) == 0
    with PIL.Image.open(tmp_path / "a.png") as both, PIL.Image.open(tmp_path / "b.png") as alone:
        assert both.width > alone.width


def test_an_index_of_one_condition_is_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Version 1, with records of 57 bytes; it is none for two conditions, and an index of two has version 2."""
    pattern = write_tars(tmp_path, samples(5))
    path = tmp_path / f"train-000.tar{SUFFIX}"
    for keys, version, record in ((KEYS[:1], 1, 57), (KEYS, 2, 74)):
        assert main(["index", str(pattern), "--shards_conditioning_key", *keys]) == 0
        _, found, length, _ = PREFIX.unpack_from(path.read_bytes())
        assert found == version
        (shard,) = json.loads(path.read_bytes()[PREFIX.size : PREFIX.size + length])["shards"]
        assert len(path.read_bytes()) == PREFIX.size + length + 5 * record + shard["key_bytes"]
        other = open_source(in_shards(pattern, KEYS[: 3 - len(keys)], conditioning_channels=(3,)))
        assert "made with other --shards_…_key" in capsys.readouterr().err
        assert len(other) == 5  # type: ignore[arg-type]
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, 8, 1)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no whole index of shards: it speaks of 4 parts of a sample, as version 1"):
        open_source(in_shards(pattern))


def test_damaged_indexes_of_several_conditions_are_told(tmp_path: Path) -> None:
    keys = shard_keys(None, ("conditioning_image.png", "image.png"), None)
    ends = run_cases(tmp_path, range(150), keys)
    assert ends["refused"] > 50


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    folder = write_prompt_json(tmp_path / "prompt.json", samples(2))
    with pytest.raises(ValueError, match=r'lacks "depth", "pose" or "target"; expected lines like \{"depth": "depth/0'):
        open_source(in_folder(folder, conditioning_image_column=("depth", "pose")))
    saved = write_dataset(tmp_path / "saved", samples(2))
    with pytest.raises(ValueError, match=r"--conditioning_image_column is 'pose', but .* has the columns image, depth"):
        open_source(in_folder(saved, conditioning_image_column=("depth", "pose"), load_from_disk=True))
    pattern = write_tars(tmp_path / "tars", samples(2))
    with pytest.raises(ValueError, match=r"has the keys .*; set --shards_conditioning_key to the right ones"):
        open_source(in_shards(pattern, ("depth.png", "pose.png")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conditioning_channels": (1, 3, 3)},
            "--conditioning_channels has 3 values and --conditioning_image_column 2",
        ),
        (
            {"conditioning_image_column": COLUMNS * 9, "conditioning_channels": (1,)},
            "18 condition images of a sample",
        ),
        (
            {"train_data_dir": None, "train_shards": ("a.tar",), "shards_conditioning_key": KEYS},
            "names 2 columns, and --train_shards has none: name the extensions",
        ),
        (
            {"train_data_dir": None, "train_shards": ("a.tar",), "conditioning_image_column": ("a",)},
            "--conditioning_channels has 2 values and --shards_conditioning_key 1",
        ),
        ({"train_data_dir": None, "cached_data": "a"}, "names 2 columns, and --cached_data has none"),
        ({"train_data_dir": None, "generated_circles": 8}, "--generated_circles draws one condition image"),
        (
            {"train_data_dir": None, "generated_circles": 8, "conditioning_image_column": ("a",)},
            "--generated_circles draws one condition image",
        ),
    ],
)
def test_counts_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sources(in_folder(Path("folder"), **changes))
