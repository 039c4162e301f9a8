"""Where samples come from. `open_source` picks the source that a configuration names."""

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
    with_order_named,
)
from shared.data.sources.named_files import allowed_folders
from shared.user_errors import UserError

__all__ = ["Manifest", "RandomAccessSource", "Source", "StreamSource", "SubsetSource", "open_source", "open_sources"]


def open_source(config: TrainConfig) -> Source:
    """The training data alone: the first of `open_sources`."""
    return open_sources(config)[0]


def open_sources(config: TrainConfig) -> tuple[Source, SubsetSource | None]:
    """The training data that `config` names, cut to --max_train_samples, and what is held out of it for evaluation.

    That it names one source, and not several, `validate` has seen to.

    Returns:
        A `RandomAccessSource` wherever the data allows it, a `StreamSource` with --streaming and for remote shards; and
        the --num_evaluation_samples held-out samples, None where none are asked for.

    Raises:
        UserError: when it cannot be found or read, when a column is missing, or when samples cannot be held out of it.
    """
    source = _open(config)
    if not isinstance(source, RandomAccessSource):
        if config.aspect_buckets is not None:
            raise UserError(
                "--aspect_buckets groups pictures by their shapes, so it needs data that can be read in any order; a "
                "stream cannot. Give local data, or leave it out"
            )
        if config.num_evaluation_samples:
            raise UserError(
                "--num_evaluation_samples holds samples out of data that can be read in any order; a stream cannot. "
                "Give local data, or leave it out"
            )
        return source, None
    source, held_out = with_order_named(source), None
    if config.num_evaluation_samples:
        source, held_out = hold_out(source, config.num_evaluation_samples, config.seed)
    if config.max_train_samples is not None:
        source = train_subset(source, config.max_train_samples, config.seed)
    return source, held_out


def _open(config: TrainConfig) -> Source:
    # Sources are imported when they are used: datasets and webdataset take a second each.
    allowed_folders(config)  # a mistake in them is heard of whatever the data is
    if config.generated_circles is not None:
        from shared.data.sources.circles import CirclesSource

        return CirclesSource(config.generated_circles, config.resolution, config.seed)
    if config.cached_data is not None:
        from shared.data.sources.cached import open_cached

        return open_cached(config, Path(config.cached_data))
    if config.train_shards is not None:
        from shared.data.sources.shards import open_shards

        return open_shards(config)
    if config.train_data_dir is not None and not config.load_from_disk:
        from shared.data.sources.folders import open_folder

        folder_source = open_folder(config, Path(config.train_data_dir))
        if folder_source is not None:
            return folder_source
    from shared.data.sources.huggingface import open_huggingface

    return open_huggingface(config)
