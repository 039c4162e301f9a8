"""`--precompute_text`: what the text encoders would make of a run's texts in its steps, made before and found on disk.

Everything that is encoded for one base model, precision and backend is in one folder, in files that appear whole and
never change: a later start encodes what is new, and runs at the same time make, at worst, the same file twice. A cache
(`--cached_data`) has such folders in it, which do not ask for the backend.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from shared.config import Backend, TrainConfig
from shared.data.sources.base import RandomAccessSource
from shared.data.tokenization import EncodedText, PromptInputs
from shared.models.digests import digest_of, digests_of_model
from shared.models.source import base_source
from shared.models.weight_files import TRANSFORMERS
from shared.outgoing.user_cache import PROJECT, in_user_cache
from shared.precomputed_text.captions import Texts, distinct_texts, every_caption
from shared.precomputed_text.layout import Layout, layout_of
from shared.precomputed_text.parts import KEY_BYTES, MOST_TEXTS, remove_leftovers, write_part
from shared.precomputed_text.store import StoredText, part_path, remove_damaged
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

TEXT_FOLDER = "text"
"""Of a cache that brings images and captions."""

_FORMAT = 1
_LARGEST_PART = 2**30  # bytes: what a start that is interrupted loses at most
_NOT_LOCKED_YET = 60.0  # seconds


class TextEncoder(NamedTuple):
    """A backend's text encoders on its devices: `encode` takes token ids of `rows` texts, always as many."""

    rows: int
    encode: EncodedText


@dataclass(frozen=True)
class Processes:
    """Those that share a folder and its work; each takes the texts that fall to it, whatever there is already.

    Attributes:
        index, count: which one this is, of how many.
        wait: for the others.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], object] = lambda: None


ALONE = Processes()


def precompute_text(
    config: TrainConfig,
    backend: Backend,
    sources: Sequence[RandomAccessSource],
    prompt_inputs: PromptInputs,
    open_encoder: Callable[[], TextEncoder],
    processes: Processes,
) -> EncodedText:
    """All captions of the sources, the empty one and the validation prompts, encoded.

    Args:
        open_encoder: called where something is to be encoded, and not kept.

    Raises:
        UserError: a text encoder is missing or damaged, a file cannot be written or read, or there is no room.
    """
    captions = every_caption(sources, config.validation_prompt or (), shows_progress=_shows_progress())
    texts = distinct_texts(captions, prompt_inputs)
    is_xl = prompt_inputs.xl is not None
    layout = layout_of(config, texts.token_ids["input_ids"].shape[1], is_xl=is_xl)
    folder = _made(config, _root(config) / _model_key(config, backend, layout, is_xl=is_xl))
    if processes.index == 0:
        remove_leftovers(folder, older_than=time.time() - _NOT_LOCKED_YET)
        remove_damaged(folder, layout, texts.keys)
        _say_and_check_room(config, folder, layout, texts)
    processes.wait()
    _encode_missing(config, folder, layout, texts, open_encoder, processes)
    processes.wait()
    stored = StoredText(folder, layout, texts.keys)
    missing = sum(key not in stored for key in texts.keys)
    if missing:
        raise UserError(
            f"{missing} of the texts in {shown(folder)} went missing while others were encoded. Let nothing delete "
            "files there, and start the run again."
        )
    return stored


def _root(config: TrainConfig) -> Path:
    """diffusers' `train_controlnet_sdxl.py` keeps its embeddings beside the data, in --cache_dir."""
    if config.cached_data is not None:
        return Path(config.cached_data) / TEXT_FOLDER
    return in_user_cache("text") if config.cache_dir is None else Path(config.cache_dir) / PROJECT / "text"


def _asked_by(config: TrainConfig) -> str:
    return "--precompute_text" if config.cached_data is None else f"--cached_data {shown(config.cached_data)}"


def _elsewhere(config: TrainConfig) -> str:
    """What to do where the folder will not do."""
    return "name a folder on another disk with --cache_dir" if config.cached_data is None else "move the cache"


def _made(config: TrainConfig, folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{_asked_by(config)}: encoded captions are kept in {shown(folder)}, which cannot be made "
            f"({error.strerror}). Let it be written to, or {_elsewhere(config)}."
        ) from error
    return folder


def _model_key(config: TrainConfig, backend: Backend, layout: Layout, *, is_xl: bool) -> str:
    """Of everything that decides what becomes of tokens.

    Two backends round differently, and what a run computes should not depend on which of them was there first.
    """
    parts = ("text_encoder", *(("text_encoder_2",) if is_xl else ()))
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "dtype": layout.stored_dtype,
        "files": {part: digests_of_model(base_source(config, part), TRANSFORMERS) for part in parts},
    }
    if config.cached_data is None:  # a cache is made once, for both backends
        facts |= {"backend": backend, "allow_tf32": config.allow_tf32}
    return digest_of(facts)


def _say_and_check_room(config: TrainConfig, folder: Path, layout: Layout, texts: Texts) -> None:
    stored = StoredText(folder, layout, texts.keys)
    new = sum(key not in stored for key in texts.keys)
    size = KEY_BYTES + layout.bytes_per_text
    logger.info(
        "What the text encoders make of %s captions and prompts (%.1f MB), %s of them new, is kept in %s",
        *(f"{len(texts.keys):,}", len(texts.keys) * size / 1e6, f"{new:,}", folder),
    )
    free = shutil.disk_usage(folder).free
    if new * size > free:
        raise UserError(
            f"{_asked_by(config)} needs {new * size / 1e9:,.1f} GB for {new:,} captions and prompts in "
            f"{shown(folder)}, where {free / 1e9:,.1f} GB are free. Free some, {_elsewhere(config)}, or leave it out."
        )


def _encode_missing(
    config: TrainConfig,
    folder: Path,
    layout: Layout,
    texts: Texts,
    open_encoder: Callable[[], TextEncoder],
    processes: Processes,
) -> None:
    stored = StoredText(folder, layout, texts.keys)
    mine = [
        index
        for index, key in enumerate(texts.keys)
        if int.from_bytes(key[:8], "little") % processes.count == processes.index and key not in stored
    ]
    if not mine:
        return
    encoder = open_encoder()
    per_part = max(1, min(MOST_TEXTS, _LARGEST_PART // layout.bytes_per_text))
    with tqdm(total=len(mine), desc="text encoders", unit="text", disable=not _shows_progress()) as progress:
        for start in range(0, len(mine), per_part):
            rows = mine[start : start + per_part]
            keys = [texts.keys[row] for row in rows]
            path = part_path(folder, keys)
            try:
                write_part(path, layout, keys, _encoded(encoder, texts, rows, progress))
            except OSError as error:
                raise UserError(
                    f"{_asked_by(config)}: {shown(path)} cannot be written ({error.strerror}). If the disk is full, "
                    f"free some room or {_elsewhere(config)}; what is written so far is kept."
                ) from error


def _encoded(
    encoder: TextEncoder, texts: Texts, rows: list[int], progress: "tqdm[Any]"
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The last ones are filled up with the last text, which counts once."""
    for start in range(0, len(rows), encoder.rows):
        some = rows[start : start + encoder.rows]
        filled = some + some[-1:] * (encoder.rows - len(some))
        yield {name: np.asarray(array)[: len(some)] for name, array in encoder.encode(texts.rows(filled)).items()}
        progress.update(len(some))


def _shows_progress() -> bool:
    """Processes that only work along log nothing but errors."""
    return logger.isEnabledFor(logging.INFO)
