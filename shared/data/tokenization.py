"""Captions → CLIP token ids.

Axes: B captions, L the tokenizer's model_max_length (77 for CLIP).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import CLIPTokenizer

Tokenize = Callable[[Sequence[str]], npt.NDArray[np.int32]]

_LONGEST_PLAUSIBLE = 4096  # transformers says 10**30 when the tokenizer's own length is not on file


def load_tokenizer(
    path: str, subfolder: str | None = None, revision: str | None = None, cache_dir: str | None = None
) -> CLIPTokenizer:
    """A CLIP tokenizer from a local folder or a Hub repository.

    Raises:
        ValueError: when there is no complete tokenizer there.
    """
    where = f"{path}/{subfolder}" if subfolder else path
    fix = f"expected tokenizer_config.json with vocab.json and merges.txt (or tokenizer.json) in {where}"
    if Path(path).is_dir() and not _has_vocabulary(Path(where)):
        raise ValueError(
            f"{where} holds no tokenizer; {fix}. Point --tokenizer_name or the base model at such a folder"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            path, subfolder=subfolder or "", revision=revision or "main", cache_dir=cache_dir
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded from {where}: {error}; {fix}") from error
    if tokenizer.model_max_length > _LONGEST_PLAUSIBLE:
        raise ValueError(f"the tokenizer in {where} does not say its model_max_length; {fix}")
    return tokenizer


def tokenizer_function(tokenizer: CLIPTokenizer) -> Tokenize:
    """captions → input_ids int32 [B,L], padded to model_max_length and truncated there.

    Not to be called from several threads at once: the tokenizer keeps its padding settings in itself.
    """

    def tokenize(captions: Sequence[str]) -> npt.NDArray[np.int32]:
        encoded = tokenizer(
            list(captions), max_length=tokenizer.model_max_length, padding="max_length", truncation=True
        )
        return np.asarray(encoded["input_ids"], dtype=np.int32)

    return tokenize


def _has_vocabulary(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )
