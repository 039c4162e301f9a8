"""Where samples come from. `open_source` picks the source that a configuration names."""

import os
from pathlib import Path

from shared.config import TrainConfig
from shared.data.sources.base import (
    Manifest,
    RandomAccessSource,
    Source,
    StreamSource,
    SubsetSource,
    hold_out,
    train_subset,
)
from shared.data.sources.named_files import NamedFiles, allowed_folders
from shared.untrusted import shown
from shared.user_errors import UserError

__all__ = ["Manifest", "RandomAccessSource", "Source", "StreamSource", "SubsetSource", "open_source", "open_sources"]


def open_source(config: TrainConfig) -> Source:
    """The training data alone: the first of `open_sources`."""
    return open_sources(config)[0]


def open_sources(config: TrainConfig) -> tuple[Source, SubsetSource | None]:
    """The training data that `config` names, cut to --max_train_samples, and what is held out of it for evaluation.

    Returns:
        A `RandomAccessSource` wherever the data allows it, a `StreamSource` with --streaming and for remote shards; and
        the --num_evaluation_samples held-out samples, None where none are asked for.

    Raises:
        UserError: when no source is named or several are, when it cannot be found or read, when a column is missing,
            or when samples cannot be held out of it.
    """
    source = _open(config)
    if not isinstance(source, RandomAccessSource):
        if config.num_evaluation_samples:
            raise UserError(
                "--num_evaluation_samples holds samples out of data that can be read in any order; a stream cannot. "
                "Give local data, or leave it out"
            )
        return source, None
    held_out = None
    if config.num_evaluation_samples:
        source, held_out = hold_out(source, config.num_evaluation_samples, config.seed)
    if config.max_train_samples is not None:
        source = train_subset(source, config.max_train_samples, config.seed)
    return source, held_out


def _open(config: TrainConfig) -> Source:
    # Sources are imported when they are used: datasets and webdataset take a second each.
    _check_exactly_one(config)
    allowed_folders(config)  # a mistake in them is heard of whatever the data is
    if config.generated_circles is not None:
        from shared.data.sources.circles import CirclesSource

        return CirclesSource(config.generated_circles, config.resolution, config.seed)
    if config.train_shards:
        from shared.data.sources.shards import open_shards

        return open_shards(config)
    if config.train_data_dir is not None and not config.load_from_disk:
        folder_source = _open_folder(config, Path(config.train_data_dir))
        if folder_source is not None:
            return folder_source
    from shared.data.sources.huggingface import open_huggingface

    return open_huggingface(config)


def _check_exactly_one(config: TrainConfig) -> None:
    given = {
        "--dataset_name": config.dataset_name is not None,
        "--train_data_dir": config.train_data_dir is not None,
        "--train_shards": bool(config.train_shards),
        "--generated_circles": config.generated_circles is not None,
    }
    named = [flag for flag, present in given.items() if present]
    if len(named) != 1:
        raise UserError(
            f"the training data is given by {' and '.join(named) or 'no flag'}; give one of {', '.join(given)}"
        )


def _open_folder(config: TrainConfig, folder: Path) -> Source | None:
    """The source of a layout that is read without datasets, None for any other folder."""
    from shared.data.sources import image_folder, prompt_json

    _check_folder(folder)
    files = NamedFiles(str(folder), folder, allowed_folders(config))
    is_prompt_json = os.path.isfile(folder / "prompt.json")
    if config.streaming:
        if is_prompt_json:
            raise UserError(
                f"--streaming reads folders through datasets, which does not know the prompt.json of "
                f"{shown(folder)!r}; leave --streaming out: this layout is not copied or loaded as a whole in any case"
            )
        return None
    if is_prompt_json:
        return prompt_json.open_prompt_json(folder, files)
    metadata = image_folder.find_metadata(folder)
    if metadata is None:
        return None
    files.check_own(metadata)
    keys = image_folder.find_keys(
        metadata, config.image_column, config.conditioning_image_column, config.caption_column
    )
    return image_folder.open_image_folder(metadata, keys, files) if keys else None


def _check_folder(folder: Path) -> None:
    if not os.path.isdir(folder):
        raise UserError(f"--train_data_dir is {shown(folder)!r}, which is not a folder; give one that exists")
    try:
        empty = not any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--train_data_dir is {shown(folder)!r}, which cannot be read: {error.strerror}") from error
    if empty:
        raise UserError(f"--train_data_dir is {shown(folder)!r}, which is empty; give a folder with training data")
