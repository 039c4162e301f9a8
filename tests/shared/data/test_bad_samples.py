import json
import logging
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pytest
import webdataset

from shared.data.batches import BatchSpec
from shared.data.sample import RawSample
from shared.data.sources import open_source
from tests.shared.data.pictures import (
    captions_in,
    config,
    loader,
    pairs,
    write_image_folder,
    write_prompt_json,
    write_tars,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_prompt_json(tmp_path / "data", pairs())


@pytest.mark.parametrize("workers", [0, 3])
def test_bad_samples_are_replaced_counted_and_named_once(
    folder: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    (folder / "image" / "0003.png").write_bytes(b"not an image")
    (folder / "conditioning_image" / "0005.png").unlink()
    lines = (folder / "prompt.json").read_text().splitlines()
    lines[9] = json.dumps({key: value for key, value in json.loads(lines[9]).items() if key != "prompt"})
    (folder / "prompt.json").write_text("\n".join(lines))

    loading = loader(config(train_data_dir=str(folder), dataloader_num_workers=workers), BatchSpec(20))
    with caplog.at_level(logging.WARNING):
        captions = [captions_in(batch) for _, (_, batch) in zip(range(3), loading.iterate(), strict=False)]
    loading.close()

    assert loading.skipped == 3
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 3
    for message, (line, reason) in zip(
        messages,
        [("line 10 ", "no caption"), ("line 4 ", "no picture of a known format"), ("line 6 ", "No such file")],
        strict=True,
    ):
        assert line in message
        assert reason in message
    good = {f"caption {index}" for index in range(20)} - {"caption 3", "caption 5", "caption 9"}
    assert all(set(epoch) == good for epoch in captions)


def test_a_stand_in_moves_no_other_sample(folder: Path) -> None:
    """So that hosts, each of which sees only its own bad samples, still agree on the batch."""
    before = captions_in(loader(config(train_data_dir=str(folder)), BatchSpec(20)).batch(0))
    (folder / "image" / "0003.png").write_bytes(b"not an image")
    after = captions_in(loader(config(train_data_dir=str(folder)), BatchSpec(20)).batch(0))
    changed = [row for row in range(20) if before[row] != after[row]]
    assert [before[row] for row in changed] == ["caption 3"]
    assert after[changed[0]] == before[(changed[0] + 1) % 20]


def test_more_than_the_limit_stops_the_run_and_names_some(folder: Path) -> None:
    for index in range(4):
        (folder / "image" / f"{index:04d}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"4 training samples cannot be used, more than --max_skipped_samples=3.*line"):
        loader(config(train_data_dir=str(folder)), BatchSpec(20)).batch(0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_epoch_of_bad_samples_is_an_error_not_a_loop(tmp_path: Path, stream: bool, workers: int) -> None:
    samples = [sample | {"image": b"broken"} for sample in pairs(3)]
    pattern = write_tars(tmp_path, samples)
    shards = (f"pipe:cat {tmp_path}/train-000.tar",) if stream else (str(pattern),)
    training = config(
        train_shards=shards, allow_shell_urls=stream, max_skipped_samples=50, dataloader_num_workers=workers
    )
    loading = loader(training)
    with pytest.raises(ValueError, match="none of the training samples can be used"):
        next(iter(loading))
    loading.close()


def test_a_tar_sample_without_its_condition_is_skipped(tmp_path: Path) -> None:
    good, *rest = pairs(4)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "0", "image.png": good["image"], "cond.png": good["image"], "txt": "good"})
        writer.write({"__key__": "1", "image.png": rest[0]["image"], "txt": "no condition"})
        writer.write({"__key__": "2", "image.png": rest[0]["image"], "cond.png": good["image"], "txt": b"caf\xe9"})
        writer.write({"__key__": "3", "image.png": rest[0]["image"], "cond.png": good["image"], "json": b"{"})
    loading = loader(config(train_shards=(str(tmp_path / "a.tar"),)))
    assert captions_in(loading.batch(0)) == ["good"] * 8
    assert loading.skipped == 3


# One clear message for each mistake.


def test_missing_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"image": "a.png", "text": "a"}]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(
        ValueError,
        match=r"--conditioning_image_column is 'conditioning_image', but .* has the columns image, text; set",
    ):
        open_source(config(train_data_dir=str(tmp_path / "saved"), load_from_disk=True))


def test_no_train_split(tmp_path: Path) -> None:
    datasets.DatasetDict(dev=datasets.Dataset.from_list(pairs(1))).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"has the splits dev; expected one called train"):
        open_source(config(train_data_dir=str(tmp_path / "saved"), load_from_disk=True))


def test_a_saved_dataset_without_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list(pairs(1)).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="with --load_from_disk"):
        open_source(config(train_data_dir=str(tmp_path / "saved")))


def test_wrong_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="which is empty; give a folder with training data"):
        open_source(config(train_data_dir=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="which is not a folder; give one that exists"):
        open_source(config(train_data_dir=str(tmp_path / "absent")))
    with pytest.raises(ValueError, match=r"cannot be loaded: .*a folder written by save_to_disk"):
        open_source(config(train_data_dir=str(tmp_path / "empty"), load_from_disk=True))
    with pytest.raises(ValueError, match=r"cannot be loaded: .*Expected a Hub name or a local folder"):
        open_source(config(dataset_name=str(tmp_path / "absent" / "deep" / "down")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lists no samples; expected one JSON object per line"),
        ("{", "line 1 is not JSON"),
        ("\n[1]\n", r"line 2 is b'\[1\]'; expected a JSON object"),
        ('{"a": 1}\n', 'lacks "source" or "target"; expected lines like'),
    ],
)
def test_wrong_prompt_json(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "prompt.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_source(config(train_data_dir=str(tmp_path)))


def test_max_train_samples_below_one() -> None:
    with pytest.raises(ValueError, match="--max_train_samples is 0"):
        open_source(config(generated_circles=3, max_train_samples=0))


def test_metadata_finds_columns_with_and_without_suffix(tmp_path: Path) -> None:
    samples = pairs(4)
    expected = loader(config(train_data_dir=str(write_image_folder(tmp_path / "reference", samples)))).batch(0)
    for number, (image, conditioning, flags) in enumerate(
        [
            ("image", "conditioning_image", {}),
            ("file_name", "conditioning_image_file_name", {}),
            ("photo_file_name", "edges", {"image_column": "photo", "conditioning_image_column": ("edges",)}),
        ]
    ):
        folder = write_image_folder(tmp_path / str(number), samples)
        text = (folder / "metadata.jsonl").read_text()
        text = text.replace('"image_file_name"', f'"{image}"')
        (folder / "metadata.jsonl").write_text(text.replace('"conditioning_image_file_name"', f'"{conditioning}"'))
        batch = loader(config(train_data_dir=str(folder), **flags)).batch(0)
        np.testing.assert_array_equal(batch["pixel_values"], expected["pixel_values"])
        np.testing.assert_array_equal(batch["conditioning_pixel_values"], expected["conditioning_pixel_values"])


def test_a_stream_of_bad_samples_ends_whatever_the_limit() -> None:
    """Two epochs are enough to see that none is good."""

    class Bad:
        manifest: ClassVar = {"location": "memory"}

        def iterate(self, epoch: int) -> Any:
            assert epoch < 5, "read on and on"
            return (RawSample(None, (b"c",), ("a",), f"bad {index}") for index in range(3))

    loading = loader(config(max_skipped_samples=10**400), source=Bad())
    with pytest.raises(ValueError, match=r"none of the training samples can be used \(3 were tried"):
        loading.batch(0)
