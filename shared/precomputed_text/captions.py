"""Every text that a run may tell its models, each once, as tokens.

Axes: N texts, L tokens.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from shared.data.sample import MOST_CAPTIONS, BadSampleError, check_text
from shared.data.sources.base import RandomAccessSource, Source, captions_at
from shared.data.tokenization import PromptInputs, TokenIds
from shared.precomputed_text.store import keys_of
from shared.user_errors import UserError

_AT_ONCE = 4096


class Texts(NamedTuple):
    """Token ids [N,L] by name, and what each text is found by: [N]."""

    keys: list[bytes]
    token_ids: TokenIds

    def rows(self, indices: list[int]) -> TokenIds:
        return {name: ids[indices] for name, ids in self.token_ids.items()}


def every_caption(
    sources: Iterable[RandomAccessSource], prompts: Iterable[str], *, shows_progress: bool
) -> Iterator[str]:
    """The empty caption, the prompts, and all captions of all samples, as often as they occur; no image is decoded.

    Samples whose captions make them bad have none.
    """
    yield ""
    yield from prompts
    for source in sources:
        indices = tqdm(range(len(source)), "captions", unit="sample", leave=False, disable=not shows_progress)
        for index in indices:
            captions = captions_at(source, index)
            if len(captions) <= MOST_CAPTIONS and all(map(_is_text, captions)):
                yield from captions


def distinct_texts(captions: Iterable[str], prompt_inputs: PromptInputs) -> Texts:
    """In the order of their first occurrence."""
    keys: dict[bytes, None] = {}  # in order
    parts: list[TokenIds] = []
    remaining = iter(captions)
    while some := list(dict.fromkeys(itertools.islice(remaining, _AT_ONCE))):
        token_ids = prompt_inputs.token_ids(some)
        found = keys_of(token_ids)
        first = {key: index for index, key in reversed(list(enumerate(found)))}
        new = sorted(index for key, index in first.items() if key not in keys)
        keys |= dict.fromkeys(found[index] for index in new)
        parts.append({name: ids[new] for name, ids in token_ids.items()})
    return Texts(list(keys), {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def countable(sources: Iterable[Source]) -> list[RandomAccessSource]:
    """Raises UserError where all captions cannot be known before the training."""
    random_access = []
    for source in sources:
        if not isinstance(source, RandomAccessSource):
            raise UserError(
                "--precompute_text needs data whose captions can all be read beforehand, and these are a stream. Give "
                "local data without --streaming, or leave it out."
            )
        random_access.append(source)
    return random_access


def _is_text(caption: str) -> bool:
    try:
        check_text(caption)
    except BadSampleError:
        return False
    return True
