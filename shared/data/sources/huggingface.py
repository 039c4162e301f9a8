"""Datasets of the `datasets` library: Hub names, local folders, `save_to_disk` folders, streaming."""

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import datasets
import huggingface_hub

from shared.config import TrainConfig
from shared.data.addresses import local_path, scheme_of, zip_parts
from shared.data.sample import NO_CAPTIONS, BadSampleError, EncodedImage, RawSample, captions_of
from shared.data.sources.base import Manifest, RandomAccessSource, StreamSource
from shared.data.sources.named_files import NamedFiles, allowed_folders
from shared.data.sources.shard_keys import IMAGE_ENDINGS
from shared.data.sources.shuffling import buffered_shuffle
from shared.outgoing.redaction import redacted
from shared.randomness import Purpose, generator
from shared.untrusted import MIB, check_plain_files, foreign_library, open_file, read_json, shown
from shared.user_errors import UserError

Columns = tuple[str, ...]  # image, conditioning images, caption
_FINGERPRINT_ROWS = 10_000
_MOST_LISTED, _LONGEST_LISTED = 30, 60  # in a message

_NUMBERS = ("int", "uint", "float", "bool", "decimal")  # beginnings of what pyarrow calls such columns

_REPAIR = "Download or write it again."
_TEXTS = (".json", ".jsonl", ".csv", ".txt")
_LONGEST_LINE = 256 * MIB  # people do write a whole list of samples as one
_PICTURE_ENDINGS = {f".{ending}" for ending in (*IMAGE_ENDINGS, "gif", "avif", "jp2")}

# What save_to_disk writes; its tables are read from wherever the state says.
_STATE, _SPLITS = "state.json", "dataset_dict.json"


class _DataFile(TypedDict):
    filename: str


class _State(TypedDict):
    _data_files: list[_DataFile]


class _Splits(TypedDict):
    splits: list[str]


def open_huggingface(config: TrainConfig) -> RandomAccessSource | StreamSource:
    """The dataset that --dataset_name or --train_data_dir names, streaming with --streaming.

    Raises:
        UserError: when it cannot be found or loaded, has files that lead out of it, has no train split, or lacks one
            of the columns.
    """
    location = str(config.dataset_name or config.train_data_dir)
    where = shown(redacted(location))
    columns = (config.image_column, *config.conditioning_image_column, config.caption_column)
    files = _named_files(config, location)
    dataset = _train_split(_load(config, location, files), where)
    with foreign_library(f"the dataset {where} cannot be read", _REPAIR):
        present = list(dataset.column_names or next(iter(dataset), {}))
    _check_columns(present, columns, where)
    _check_captions((dataset.features or {}).get(columns[-1]), columns[-1], where)
    with foreign_library(f"the dataset {where} cannot be read", _REPAIR):
        dataset = _undecoded(dataset, columns)
        if isinstance(dataset, datasets.IterableDataset):
            return HuggingFaceStream(dataset, columns, location, files, config)
        _check_tables(dataset, config)
        rows, fingerprint = len(dataset), _fingerprint(dataset, columns)
    if not rows:
        raise UserError(f"the train split of {where} is empty; expected at least one sample")
    return HuggingFaceSource(dataset, columns, location, files, config.dataset_config_name, fingerprint)


class HuggingFaceSource:
    """Random access to a `datasets.Dataset`."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        columns: Columns,
        location: str,
        files: NamedFiles,
        config_name: str | None,
        fingerprint: str,
    ) -> None:
        self._dataset, self._columns, self._location, self._files = dataset, columns, redacted(location), files
        self._captions = dataset.select_columns([column for column in columns[-1:] if column != NO_CAPTIONS])
        self._images = dataset.select_columns([columns[0]])
        self.manifest: Manifest = {
            "kind": "huggingface",
            "location": self._location,
            "config_name": config_name,
            "samples": len(dataset),
            "fingerprint": fingerprint,
            "columns": list(columns),
        }

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> RawSample:
        name = f"{self._location}[{index}]"
        with foreign_library(f"{shown(name)} cannot be read", _REPAIR):
            row = self._dataset[index]
        return _raw_sample(row, self._columns, self._files, name)

    def captions(self, index: int) -> tuple[str, ...]:
        """Without reading the images."""
        with foreign_library(f"{shown(self._location)}[{index}] cannot be read", _REPAIR):
            row = self._captions[index]
        return captions_of(row.get(self._columns[-1]))

    def header(self, index: int) -> EncodedImage | None:
        """See `header_at`."""
        with foreign_library(f"{shown(self._location)}[{index}] cannot be read", _REPAIR):
            row = self._images[index]
        try:
            return _image(row[self._columns[0]], self._files)
        except BadSampleError:
            return None


class HuggingFaceStream:
    """A `datasets.IterableDataset`: its shards in a seeded order, its rows through a shuffle buffer."""

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        columns: Columns,
        location: str,
        files: NamedFiles,
        config: TrainConfig,
    ) -> None:
        self._dataset, self._columns, self._location, self._files = dataset, columns, redacted(location), files
        self._seed, self._buffer_size = config.seed, config.shuffle_buffer_size
        self._max_samples = config.max_train_samples
        self.manifest: Manifest = {
            "kind": "huggingface_stream",
            "location": self._location,
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
        rows = self._readable(self._rows(epoch))
        samples = (_raw_sample(row, self._columns, self._files, self._name(row)) for row in rows)
        return buffered_shuffle(samples, self._buffer_size, self._seed, epoch)

    def _rows(self, epoch: int) -> Iterator[dict[str, Any]]:
        if self._max_samples is not None:
            return itertools.islice(self._dataset, self._max_samples)
        # datasets' own shuffle is left alone: what it does with the same seed changes between its versions.
        count = self._dataset.num_shards
        order = generator(self._seed, Purpose.SHARD_ORDER, epoch).permutation(count)
        shards = (self._dataset.shard(num_shards=count, index=int(index)) for index in order)
        return itertools.chain.from_iterable(shards)

    def _readable(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows; UserError where the library cannot read on."""
        iterator = iter(rows)
        while True:
            with foreign_library(f"the dataset {shown(self._location)} cannot be read any further", _REPAIR):
                row = next(iterator, None)
            if row is None:
                return
            yield row

    def _name(self, row: dict[str, Any]) -> str:
        """A stream has no row numbers that survive its shuffling, so a sample is named by its file or its content."""
        image = row[self._columns[0]]
        path = image.get("path") if isinstance(image, dict) else image
        content = image.get("bytes") if isinstance(image, dict) else None
        path = redacted(path) if isinstance(path, str) else path
        if isinstance(content, bytes) and content:
            return f"{self._location}: {path or 'image'} (crc32 {zlib.crc32(content):08x})"
        return f"{self._location}: {path}"


def _load(config: TrainConfig, location: str, files: NamedFiles) -> Any:
    where = shown(redacted(location))
    fix = (
        "Expected a Hub name or a local folder; a folder written by save_to_disk goes to --train_data_dir with "
        "--load_from_disk"
    )
    failure = f"the dataset {where!r} cannot be loaded"
    folder = Path(location)
    if os.path.isdir(folder):
        _check_folder(folder, files)
        if os.path.exists(folder / _STATE) and not config.load_from_disk:
            raise UserError(f"{failure}: it was written by save_to_disk. {fix}")
    try:
        with foreign_library(f"{failure}: the datasets library failed", fix):
            if config.load_from_disk:
                return datasets.load_from_disk(location)
            builder = datasets.load_dataset_builder(location, config.dataset_config_name, cache_dir=config.cache_dir)
        _check_data_files(builder, files)
        with foreign_library(f"{failure}: the datasets library failed", fix):
            if config.streaming:
                return builder.as_streaming_dataset()
            builder.download_and_prepare()
            return builder.as_dataset()
    except ValueError as error:
        if redacted(location) == location:
            raise
        # The reason may quote what is secret in the address.
        raise UserError(f"{failure} ({type(error.__cause__).__name__}). {fix}") from None


def _named_files(config: TrainConfig, location: str) -> NamedFiles:
    """What rows may name: files of a local folder, of the libraries' caches, which hold what was downloaded or unpacked
    of the dataset, and remote files."""
    caches = (
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        datasets.config.EXTRACTED_DATASETS_PATH,
        huggingface_hub.constants.HF_HUB_CACHE,
        config.cache_dir,
    )
    allowed = [*allowed_folders(config), *(cache for cache in caches if cache is not None)]
    folder = Path(location) if os.path.isdir(location) else None
    return NamedFiles(location, folder, allowed, addresses=True)


def _check_folder(folder: Path, files: NamedFiles) -> None:
    """Raises UserError for what the library would wait for, or follow out of the folder; pictures wait their turn."""
    for entry in _entries(folder):
        if entry.is_file(follow_symlinks=False) or _is_picture(entry.name):
            continue
        path = Path(entry.path)
        check_plain_files([] if os.path.isdir(path) else [path])
        if entry.is_symlink() and os.path.exists(path):
            files.check_own(path)
    _check_saved(folder, files)


def _check_saved(folder: Path, files: NamedFiles) -> None:
    """Raises UserError where a dataset written by save_to_disk has tables or splits outside of it."""
    again = "Write the dataset again with save_to_disk."
    for path in (folder / _STATE, *folder.glob(f"*/{_STATE}")):
        if os.path.isfile(path):
            state: _State = read_json(path, _State, fix=again)
            for file in state["_data_files"]:
                files.check_own(path.parent / file["filename"])
    if os.path.isfile(folder / _SPLITS):
        splits: _Splits = read_json(folder / _SPLITS, _Splits, fix=again)
        for name in splits["splits"]:
            if name in ("", ".", "..") or "/" in name:
                raise UserError(f"{shown(folder / _SPLITS)} names the split {shown(name)!r}: no folder's name. {again}")


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder but folders themselves; links to folders, which datasets does not enter, once."""
    waiting = [str(folder)]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError as error:
            raise UserError(f"{shown(error.filename)} cannot be read: {error.strerror}.") from error
        waiting += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        yield from (entry for entry in entries if not entry.is_dir(follow_symlinks=False))


def _check_data_files(builder: datasets.DatasetBuilder, files: NamedFiles) -> None:
    """Raises UserError where a dataset's own description (its README.md) names files outside of it."""
    for paths in (builder.config.data_files or {}).values():
        for path in paths:
            parts = zip_parts(str(path))
            inner = parts[1] if parts else str(path)
            if scheme_of(inner) is None and not _is_picture(inner):
                files.check_own(Path(local_path(inner)))
                check_plain_files([Path(local_path(inner))])
                _check_first_line(Path(local_path(inner)))


def _check_first_line(path: Path) -> None:
    """Raises UserError for a text that begins with a line which fits no memory: the library reads up to its end."""
    if path.suffix.lower() not in _TEXTS:
        return
    with open_file(path) as file:
        for _ in range(_LONGEST_LINE // MIB):
            part = file.read(MIB)
            if len(part) < MIB or b"\n" in part:
                return
    raise UserError(
        f"{shown(path)} begins with a line of more than {_LONGEST_LINE // MIB} MiB. Write one sample per line."
    )


def _is_picture(name: str) -> bool:
    """Whether a file is opened, and held against the folders, when its row's turn comes."""
    return os.path.splitext(name)[1].lower() in _PICTURE_ENDINGS


def _check_tables(dataset: datasets.Dataset, config: TrainConfig) -> None:
    """Raises an error of pyarrow where a saved table points outside of itself: nothing checks that when it is read."""
    if config.load_from_disk:
        dataset.data.validate(full=True)


def _train_split(loaded: Any, where: str) -> Any:
    if isinstance(loaded, datasets.Dataset | datasets.IterableDataset):
        return loaded
    if "train" not in loaded:
        splits = ", ".join(shown(split, _LONGEST_LISTED) for split in list(loaded)[:_MOST_LISTED])
        raise UserError(f"{where} has the splits {splits}; expected one called train: rename one so")
    return loaded["train"]


def _check_columns(present: list[str], columns: Columns, where: str) -> None:
    conditions = ["--conditioning_image_column"] * (len(columns) - 2)
    flags = ("--image_column", *conditions, "--caption_column")
    listed = ", ".join(shown(column, _LONGEST_LISTED) for column in present[:_MOST_LISTED])
    for flag, column in zip(flags, columns, strict=True):
        if column not in present and column != NO_CAPTIONS:
            raise UserError(
                f"{flag} is {column!r}, but {where} has the columns {listed or '(none)'}; set {flag} to one of those"
            )


def _check_captions(feature: Any, column: str, where: str) -> None:
    """Raises UserError for a column of numbers or labels: all of its samples would be bad."""
    dtype = str(getattr(feature, "dtype", ""))
    if dtype.startswith(_NUMBERS):
        what = "class labels" if isinstance(feature, datasets.ClassLabel) else f"numbers ({dtype})"
        raise UserError(
            f"--caption_column is {column!r}, which in {where} holds {what}, not texts; name a column with captions, "
            "or make texts of these"
        )


def _undecoded(dataset: Any, columns: Columns) -> Any:
    dataset = dataset.with_format(None).select_columns([*dict.fromkeys(filter(NO_CAPTIONS.__ne__, columns))])
    for column in columns[:-1]:
        if isinstance((dataset.features or {}).get(column), datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _raw_sample(row: dict[str, Any], columns: Columns, files: NamedFiles, name: str) -> RawSample:
    *pictures, caption = (row.get(column) for column in columns)
    try:
        image, *conditions = (_image(picture, files) for picture in pictures)
        return RawSample(image, tuple(conditions), captions_of(caption), name)
    except BadSampleError as error:
        return RawSample(None, (), (), name, str(error))


def _image(value: Any, files: NamedFiles) -> EncodedImage | None:
    """An image column's value: {bytes, path} as datasets stores images, bytes, or a path or URL.

    Relative paths are relative to the dataset's folder where there is one. BadSampleError where they may not be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return (value or None) if isinstance(value, bytes) else files.find(value)


def _fingerprint(dataset: datasets.Dataset, columns: Columns) -> str:
    """A hash of the captions in their order, where they are asked for.

    datasets' own fingerprint covers modification times, and would call a copy of the same data another dataset.
    """
    digest = hashlib.sha256(json.dumps([len(dataset), columns]).encode())
    if columns[-1] != NO_CAPTIONS:
        for rows in dataset.select_columns([columns[-1]]).iter(batch_size=_FINGERPRINT_ROWS):
            digest.update(json.dumps(rows[columns[-1]], default=str).encode())
    return digest.hexdigest()
