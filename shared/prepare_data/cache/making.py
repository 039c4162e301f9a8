"""A whole cache: what is encoded, whether the folder is one for it, and what it says of itself at the end."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from shared.config import Backend, TrainConfig
from shared.data.cache_record import RECORD_FILE, CacheRecord, new_record, read_record
from shared.data.sources import RandomAccessSource, open_source
from shared.data.sources.cached import keys_of, shards_in
from shared.data.sources.shards import ShardSource
from shared.data.tokenization import PromptInputs
from shared.diffusion.schedule import NoiseSchedule
from shared.models.base_model import check_base_model
from shared.models.source import base_source
from shared.models.stored_dtypes import STORED_DTYPES
from shared.models.xl import is_xl
from shared.precomputed_text.precomputing import ALONE, precompute_text
from shared.prepare_data.cache.encoders import Encoders
from shared.prepare_data.cache.writing import write_shards
from shared.prepare_data.indexing import index_shards
from shared.prepare_data.parallel import threads_of
from shared.run.folder import make_run_folder
from shared.run.lock import run_lock
from shared.run.setup import prompt_inputs_of
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)


def make_cache(config: TrainConfig, backend: Backend, open_encoders: Callable[[TrainConfig], Encoders]) -> None:
    """Encode the data that a configuration names into its `output_dir`, or go on with that.

    Args:
        open_encoders: called when everything else is known to be right; no model is loaded yet.

    Raises:
        UserError: a mistake in the flags, the model or the data, or the folder holds something else.
    """
    config = dataclasses.replace(config, num_evaluation_samples=0, evaluation_fidelity="none")
    folder = make_run_folder(config)
    schedule = NoiseSchedule.from_source(base_source(config, "scheduler"))
    prompt_inputs = prompt_inputs_of(config, is_xl=is_xl(check_base_model(config, schedule.config)))
    source = open_source(config)
    if not isinstance(source, RandomAccessSource):
        raise UserError(
            "A cache is made of data that can be read in any order, and these are a stream. Give local data without "
            "--streaming."
        )
    encoders = open_encoders(config)
    config = encoders.config
    stored_dtype = STORED_DTYPES[config.mixed_precision or "no"]
    record = new_record(config, source.manifest, encoders.latent_shape, stored_dtype)
    with run_lock(folder):
        _begin(folder, record)
        skipped = write_shards(folder, source, config, record, encoders.open_image_encoder)
        _encode_captions(folder, config, backend, source, prompt_inputs, encoders)
        samples = _indexed(folder, record)
        _write_record(folder, record.finished(samples))
    channels = record.channels_of_conditions
    logger.info(
        "%s holds %s samples%s: train with --cached_data %s in place of the flags that name the data%s",
        *(folder, f"{samples:,}", f" ({skipped} could not be used)" if skipped else "", folder),
        f", and --conditioning_channels {' '.join(map(str, channels))}" if len(channels) > 1 else "",
    )


def _begin(folder: Path, record: CacheRecord) -> None:
    """Make the folder's record, or see that it is this one."""
    if (folder / RECORD_FILE).is_file():
        there = read_record(folder)
        differing = [
            field.name
            for field in dataclasses.fields(record)
            if field.name != "samples" and getattr(there, field.name) != getattr(record, field.name)
        ]
        if differing:
            raise UserError(
                f"--output_dir {shown(folder)} holds another cache ({', '.join(differing)} differ): choose another "
                "folder, or delete it."
            )
    elif shards_in(folder):
        raise UserError(
            f"--output_dir {shown(folder)} holds shards of a cache without the {RECORD_FILE} that says of what: choose "
            "another folder, or delete them."
        )
    _write_record(folder, record)


def _indexed(folder: Path, record: CacheRecord) -> int:
    """How many samples there are; a training finds the index beside the shards."""
    shards, keys = shards_in(folder), keys_of(record)
    index_shards(shards, keys, threads_of(None))
    return len(ShardSource(shards, keys))


def _write_record(folder: Path, record: CacheRecord) -> None:
    try:
        record.write(folder)
    except OSError as error:
        raise UserError(
            f"{shown(folder / RECORD_FILE)} cannot be written ({error.strerror}). If the disk is full, free some room "
            "and start again."
        ) from error


def _encode_captions(
    folder: Path,
    config: TrainConfig,
    backend: Backend,
    source: RandomAccessSource,
    prompt_inputs: PromptInputs,
    encoders: Encoders,
) -> None:
    """Those of the data, the empty one, and the validation prompts that are given."""
    into_cache = dataclasses.replace(config, cached_data=str(folder))
    precompute_text(into_cache, backend, [source], prompt_inputs, encoders.open_text_encoder, ALONE)
