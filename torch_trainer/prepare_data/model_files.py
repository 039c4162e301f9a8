"""Models of transformers from a folder or the Hub, for conditions and captions.

transformers follows what a folder says: code and adapters beside the weights, backbones on the Hub, pickles. It gets a
folder of links to just the files that are needed, after they have been looked at.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging as transformers_logging

from shared.models.source import CONFIG_FILE, ModelSource
from shared.models.weight_files import TRANSFORMERS, safetensors_files
from shared.untrusted import MIB, foreign_library, parse_json, read_file, shown
from shared.user_errors import UserError

IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")

_LARGEST_FILE = 32 * MIB  # beside the weights
_LARGEST_NUMBER = 2**20  # in a configuration: sizes, counts, tokens of a vocabulary


class LoadedModel(NamedTuple):
    """A model in float32 and in evaluation mode, on `device`, and what its inputs are made with."""

    model: Any
    processor: Any
    device: torch.device


def load_model(
    model_class: Any, processor_class: Any, name: str, files: Sequence[str], cache_dir: str | None = None
) -> LoadedModel:
    """A model whose weights are all on file, as safetensors.

    Args:
        model_class: of transformers; it has `from_pretrained`, as `processor_class` has.
        name: a folder, or a repository of the Hub.
        files: what `processor_class` reads, where it is there.
        cache_dir: of downloads; the Hub library's own where None.

    Raises:
        UserError: it cannot be found or read, is of another kind, or has weights missing or in pickles.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source = ModelSource(name, cache_dir=cache_dir).pinned(CONFIG_FILE)
    folder = source.folder(TRANSFORMERS)
    small = {file: path for file in files if (path := source.optional_file(file)) is not None}
    contents = {
        file: read_file(path, _LARGEST_FILE) for file, path in (small | {CONFIG_FILE: folder / CONFIG_FILE}).items()
    }
    for file in (CONFIG_FILE, *IMAGE_PROCESSOR_FILES):
        if file in contents:
            _check_settings(contents[file], f"{source.name}/{file}")
    with tempfile.TemporaryDirectory(prefix="model-") as links:
        for file, content in contents.items():
            Path(links, file).write_bytes(content)
        _link_weights(folder, Path(links))
        fix = f"Expected what {model_class.__name__} of transformers loads, as save_pretrained writes it."
        with foreign_library(f"{source.name} cannot be loaded", fix):
            processor = processor_class.from_pretrained(links, local_files_only=True, trust_remote_code=False)
            model, report = model_class.from_pretrained(
                links,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    missing = sorted(map(str, {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}))
    if missing:
        raise UserError(
            f"The weights of {source.name} lack {shown(missing[0])}, or have another shape for it ({len(missing)} in "
            f"all): expected those of a whole {type(model).__name__}."
        )
    device = device_there()
    return LoadedModel(model.eval().requires_grad_(False).to(device), processor, device)


def device_there() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _link_weights(folder: Path, links: Path) -> None:
    """With the names that transformers looks for."""
    shards = safetensors_files(folder, TRANSFORMERS)
    for shard in shards:
        (links / shard.name).symlink_to(shard.absolute())
    index = folder / "model.safetensors.index.json"
    if [shard.name for shard in shards] != ["model.safetensors"]:
        (links / index.name).write_bytes(read_file(index, _LARGEST_FILE))


def _check_settings(content: bytes, where: str) -> None:
    """Raises UserError for a configuration that leads elsewhere, or to more than any memory."""
    _check_value(parse_json(content, dict[str, Any], where=where, fix="Copy or download it again."), where)


def _check_value(value: Any, where: str) -> None:
    match value:
        case dict():
            if isinstance(value.get("backbone"), str) and not value.get("backbone_config"):
                raise UserError(
                    f"{where} takes its backbone from elsewhere ({shown(value['backbone'])}): expected a model whose "
                    "backbone_config is in its own configuration."
                )
            for part in value.values():
                _check_value(part, where)
        case list():
            for part in value:
                _check_value(part, where)
        case int() | float() if not abs(value) <= _LARGEST_NUMBER:
            raise UserError(f"{where} has the number {shown(json.dumps(value))}: larger than any model's. Correct it.")
