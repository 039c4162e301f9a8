"""Datasets of the `datasets` library: Hub names, local folders, `save_to_disk` folders, streaming."""

import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from shared.config import TrainConfig
from shared.data.sample import EncodedImage, RawSample, captions_of
from shared.data.sources.base import Manifest, RandomAccessSource, StreamSource
from shared.data.sources.shuffling import buffered_shuffle
from shared.randomness import Purpose, generator

Columns = tuple[str, str, str]  # image, conditioning image, caption
_FINGERPRINT_ROWS = 10_000


def open_huggingface(config: TrainConfig) -> RandomAccessSource | StreamSource:
    """The dataset that --dataset_name or --train_data_dir names, streaming with --streaming.

    Raises:
        ValueError: when it cannot be found or loaded, has no train split, or lacks one of the three columns.
    """
    location = str(config.dataset_name or config.train_data_dir)
    dataset = _train_split(_load(config, location), location)
    columns = (config.image_column, config.conditioning_image_column, config.caption_column)
    _check_columns(dataset, columns, location)
    dataset = _undecoded(dataset, columns)
    if isinstance(dataset, datasets.IterableDataset):
        return HuggingFaceStream(dataset, columns, location, config)
    return HuggingFaceSource(dataset, columns, location, config.dataset_config_name)


class HuggingFaceSource:
    """Random access to a `datasets.Dataset`."""

    def __init__(self, dataset: datasets.Dataset, columns: Columns, location: str, config_name: str | None) -> None:
        if not len(dataset):
            raise ValueError(f"the train split of {location} is empty; expected at least one sample")
        self._dataset, self._columns, self._location = dataset, columns, location
        self.manifest: Manifest = {
            "kind": "huggingface",
            "location": location,
            "config_name": config_name,
            "samples": len(dataset),
            "fingerprint": _fingerprint(dataset, columns),
            "columns": list(columns),
        }

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> RawSample:
        return _raw_sample(self._dataset[index], self._columns, self._location, f"{self._location}[{index}]")


class HuggingFaceStream:
    """A `datasets.IterableDataset`: its shards in a seeded order, its rows through a shuffle buffer."""

    def __init__(self, dataset: datasets.IterableDataset, columns: Columns, location: str, config: TrainConfig) -> None:
        self._dataset, self._columns, self._location = dataset, columns, location
        self._seed, self._buffer_size = config.seed, config.shuffle_buffer_size
        self._max_samples = config.max_train_samples
        self.manifest: Manifest = {
            "kind": "huggingface_stream",
            "location": location,
            "config_name": config.dataset_config_name,
            "samples": None,
            "fingerprint": None,
            "columns": list(columns),
            "shards": dataset.num_shards,
            "shuffle_buffer_size": config.shuffle_buffer_size,
            "max_train_samples": config.max_train_samples,
        }

    def iterate(self, epoch: int) -> Iterator[RawSample]:
        """The samples of one epoch. --max_train_samples takes the same first ones in every epoch."""
        rows = self._rows(epoch)
        samples = (_raw_sample(row, self._columns, self._location, self._name(row)) for row in rows)
        return buffered_shuffle(samples, self._buffer_size, self._seed, epoch)

    def _rows(self, epoch: int) -> Iterator[dict[str, Any]]:
        if self._max_samples is not None:
            return itertools.islice(self._dataset, self._max_samples)
        # datasets' own shuffle is left alone: what it does with the same seed changes between its versions.
        count = self._dataset.num_shards
        order = generator(self._seed, Purpose.SHARD_ORDER, epoch).permutation(count)
        shards = (self._dataset.shard(num_shards=count, index=int(index)) for index in order)
        return itertools.chain.from_iterable(shards)

    def _name(self, row: dict[str, Any]) -> str:
        """A stream has no row numbers that survive its shuffling, so a sample is named by its file or its content."""
        image = row[self._columns[0]]
        path = image.get("path") if isinstance(image, dict) else image
        content = image.get("bytes") if isinstance(image, dict) else None
        if content:
            return f"{self._location}: {path or 'image'} (crc32 {zlib.crc32(content):08x})"
        return f"{self._location}: {path}"


def _load(config: TrainConfig, location: str) -> Any:
    try:
        if config.load_from_disk:
            return datasets.load_from_disk(location)
        return datasets.load_dataset(
            location,
            config.dataset_config_name,
            cache_dir=config.cache_dir,
            streaming=config.streaming,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"the dataset {location!r} cannot be loaded: {error}. Expected a Hub name or a local folder; a folder "
            "written by save_to_disk goes to --train_data_dir with --load_from_disk"
        ) from error


def _train_split(loaded: Any, location: str) -> Any:
    if isinstance(loaded, datasets.Dataset | datasets.IterableDataset):
        return loaded
    if "train" not in loaded:
        raise ValueError(f"{location} has the splits {', '.join(loaded)}; expected one called train: rename one so")
    return loaded["train"]


def _check_columns(dataset: Any, columns: Columns, location: str) -> None:
    present = dataset.column_names or list(next(iter(dataset), {}))
    flags = ("--image_column", "--conditioning_image_column", "--caption_column")
    for flag, column in zip(flags, columns, strict=True):
        if column not in present:
            raise ValueError(
                f"{flag} is {column!r}, but {location} has the columns {', '.join(present) or '(none)'}; "
                f"set {flag} to one of those"
            )


def _undecoded(dataset: Any, columns: Columns) -> Any:
    dataset = dataset.select_columns(list(dict.fromkeys(columns)))
    for column in columns[:2]:
        if isinstance((dataset.features or {}).get(column), datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _raw_sample(row: dict[str, Any], columns: Columns, location: str, name: str) -> RawSample:
    image, conditioning_image, caption = (row[column] for column in columns)
    return RawSample(_image(image, location), _image(conditioning_image, location), captions_of(caption), name)


def _image(value: Any, location: str) -> EncodedImage | None:
    """An image column's value: {bytes, path} as datasets stores images, bytes, or a path or URL.

    Relative paths are relative to the dataset's folder where there is one.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value and "://" not in value:
        return Path(location, value) if Path(location).is_dir() else Path(value)
    return value if isinstance(value, bytes | str) and value else None


def _fingerprint(dataset: datasets.Dataset, columns: Columns) -> str:
    """A hash of the captions in their order.

    datasets' own fingerprint covers modification times, and would call a copy of the same data another dataset.
    """
    digest = hashlib.sha256(json.dumps([len(dataset), columns]).encode())
    for rows in dataset.select_columns([columns[2]]).iter(batch_size=_FINGERPRINT_ROWS):
        digest.update(json.dumps(rows[columns[2]], default=str).encode())
    return digest.hexdigest()
