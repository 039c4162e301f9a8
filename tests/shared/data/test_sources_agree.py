"""The same twenty pictures in every layout give the same batches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from shared.config import TrainConfig
from shared.data.sources import RandomAccessSource, open_source
from tests.shared.data.pictures import (
    config,
    loader,
    pairs,
    write_image_folder,
    write_prompt_json,
    write_tars,
)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def features() -> datasets.Features:
    return datasets.Features(
        {"text": datasets.Value("string"), "image": datasets.Image(), "conditioning_image": datasets.Image()}
    )


def hf_dataset() -> datasets.Dataset:
    return datasets.Dataset.from_list(pairs(), features=features())


def saved(folder: Path) -> TrainConfig:
    hf_dataset().save_to_disk(str(folder))
    return config(train_data_dir=str(folder), load_from_disk=True)


def saved_dict(folder: Path) -> TrainConfig:
    datasets.DatasetDict(train=hf_dataset()).save_to_disk(str(folder))
    return config(train_data_dir=str(folder), load_from_disk=True)


def parquet(folder: Path) -> TrainConfig:
    folder.mkdir()
    hf_dataset().to_parquet(folder / "train.parquet")
    return config(dataset_name=str(folder))


def paths_in_parquet(folder: Path) -> TrainConfig:
    write_prompt_json(folder / "files", pairs())
    (folder / "data").mkdir()
    rows = [
        {
            "image": str(folder / "files" / "image" / f"{index:04d}.png"),
            "conditioning_image": f"../files/conditioning_image/{index:04d}.png",
            "text": sample["text"],
        }
        for index, sample in enumerate(pairs())
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / "train.parquet")
    return config(train_data_dir=str(folder / "data"), allowed_data_dirs=(str(folder / "files"),))


def custom_columns(folder: Path) -> TrainConfig:
    names = {"image": "picture", "conditioning_image": "edges", "text": "words"}
    hf_dataset().rename_columns(names).save_to_disk(str(folder))
    return config(
        train_data_dir=str(folder),
        load_from_disk=True,
        image_column="picture",
        conditioning_image_column=("edges",),
        caption_column="words",
    )


def image_folder_in_train(folder: Path) -> TrainConfig:
    write_image_folder(folder / "train", pairs())
    return config(train_data_dir=str(folder))


LAYOUTS: dict[str, Callable[[Path], TrainConfig]] = {
    "save_to_disk": saved,
    "save_to_disk with splits": saved_dict,
    "other column names": custom_columns,
    "parquet": parquet,
    "parquet of paths": paths_in_parquet,
    "image folder through datasets": lambda folder: config(dataset_name=str(write_image_folder(folder, pairs()))),
    "image folder": lambda folder: config(train_data_dir=str(write_image_folder(folder, pairs()))),
    "image folder in train/": image_folder_in_train,
    "prompt.json": lambda folder: config(train_data_dir=str(write_prompt_json(folder, pairs()))),
    "tars": lambda folder: config(train_shards=(str(write_tars(folder, pairs())),)),
    "tars in braces": lambda folder: config(train_shards=(braces(folder),)),
}


def braces(folder: Path) -> str:
    write_tars(folder, pairs())
    return f"{folder}/train-{{000..002}}.tar"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return batches(config(train_data_dir=str(write_prompt_json(tmp_path_factory.mktemp("reference"), pairs()))))


def batches(training: TrainConfig) -> list[dict[str, Any]]:
    """Six batches of eight: two epochs of twenty and a part of the third."""
    loading = loader(training)
    return [loading.batch(step) for step in range(6)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, tmp_path: Path, reference: list[dict[str, Any]]) -> None:
    for batch, expected in zip(batches(LAYOUTS[layout](tmp_path / "data")), reference, strict=True):
        assert batch.keys() == expected.keys()
        for name, array in batch.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_a_subset_is_the_same_for_every_layout_and_in_every_epoch(tmp_path: Path) -> None:
    def rows(name: str) -> tuple[list[bytes], set[bytes]]:
        training = LAYOUTS[name](tmp_path / name.replace("/", ""))
        loading = loader(config(**{**vars(training), "max_train_samples": 4}))
        seen = [pixels.tobytes() for step in range(2) for pixels in loading.batch(step)["pixel_values"][0]]
        return seen, set(seen)

    (in_folder, distinct), (in_tars, _) = rows("prompt.json"), rows("tars")
    assert in_folder == in_tars
    assert len(distinct) == 4
    assert all(set(in_folder[start : start + 4]) == distinct for start in range(0, 16, 4))


@pytest.mark.parametrize("layout", [*LAYOUTS, "circles"])
@pytest.mark.parametrize(("asked", "held_out"), [(1, 0), (4, 0), (20, 0), (50, 0), (None, 0), (4, 3), (19, 3)])
def test_the_manifest_counts_the_samples_that_are_trained_on(
    layout: str, asked: int | None, held_out: int, tmp_path: Path
) -> None:
    training = LAYOUTS[layout](tmp_path / "data") if layout in LAYOUTS else config(generated_circles=20)
    changed = config(**{**vars(training), "max_train_samples": asked, "num_evaluation_samples": held_out})
    source = open_source(changed)
    assert isinstance(source, RandomAccessSource)
    assert source.manifest["samples"] == len(source) == min(asked or 20, 20 - held_out)


@pytest.mark.parametrize("layout", ["save_to_disk", "image folder", "prompt.json", "tars"])
def test_a_manifest_survives_json_and_tells_changed_data(layout: str, tmp_path: Path) -> None:
    training = LAYOUTS[layout](tmp_path / "data")
    manifest = open_source(training).manifest
    assert json.loads(json.dumps(manifest)) == manifest == open_source(training).manifest
    assert manifest["samples"] == 20
    assert {"kind", "location", "fingerprint", "columns"} <= manifest.keys()

    other = [sample | {"text": "another, longer caption " * 60} for sample in pairs()]
    writers: dict[str, Callable[[Path], TrainConfig]] = {
        "save_to_disk": lambda folder: config(train_data_dir=save(folder, other), load_from_disk=True),
        "image folder": lambda folder: config(train_data_dir=str(write_image_folder(folder, other))),
        "prompt.json": lambda folder: config(train_data_dir=str(write_prompt_json(folder, other))),
        "tars": lambda folder: config(train_shards=(str(write_tars(folder, other)),)),
    }
    changed = open_source(writers[layout](tmp_path / "other")).manifest
    assert changed["fingerprint"] != manifest["fingerprint"]


def save(folder: Path, samples: list[dict[str, Any]]) -> str:
    datasets.Dataset.from_list(samples, features=features()).save_to_disk(str(folder))
    return str(folder)
