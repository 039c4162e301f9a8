"""Captions → CLIP token ids.

Axes: B captions, L the tokenizer's model_max_length (77 for CLIP).
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from transformers import CLIPTokenizer

from shared.model_files.tokenizer_files import read_tokenizer

Tokenize = Callable[[Sequence[str]], npt.NDArray[np.int32]]


def load_tokenizer(
    path: str, subfolder: str | None = None, revision: str | None = None, cache_dir: str | None = None
) -> CLIPTokenizer:
    """A CLIP tokenizer from a local folder or a Hub repository.

    Raises:
        ValueError: when there is no complete tokenizer there, or it cannot be read or used.
    """
    return read_tokenizer(path, subfolder, revision, cache_dir)


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
