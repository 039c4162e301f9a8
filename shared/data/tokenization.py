"""Captions → CLIP token ids.

Axes: B captions, L the tokenizer's model_max_length (77 for CLIP).
"""

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import CLIPTokenizer

from shared.data.sample import BadSampleError, check_text
from shared.models.xl import Sizes, sizes_of_image
from shared.untrusted import foreign_library, shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

Tokenize = Callable[[Sequence[str]], npt.NDArray[np.int32]]
TokenIds = Mapping[str, npt.NDArray[np.int32]]
"""`input_ids` [B,L] and, for Stable Diffusion XL, `input_ids_2` [B,L]."""
ENCODED_TEXT = ("prompt_embeds", "pooled_prompt_embeds")
EncodedText = Callable[[TokenIds], dict[str, npt.NDArray[Any]]]
"""What the text encoders made of them, by the names that batches have for it."""

_LONGEST_TOKEN = 256  # CLIP's longest has some fifty
# What is not Unicode's White_Space, which the tokenizer splits at.
_WORD = re.compile("[^\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+")


@dataclass(frozen=True)
class XLInputs:
    """What Stable Diffusion XL is told besides the first text encoder's tokens.

    Attributes:
        tokenize: captions → int32 [B,L] for the second text encoder.
        sizes: of every image; None where each has its own.
        zeros_for_empty_prompt: whether sampling without a negative prompt is guided away from zeros, not from what
            the encoders make of the empty text: `force_zeros_for_empty_prompt` of its `model_index.json`.
    """

    tokenize: Tokenize
    sizes: Sizes | None
    zeros_for_empty_prompt: bool = True


@dataclass(frozen=True)
class PromptInputs:
    """captions → what a model is told with them, by the names that batches have for it.

    `input_ids` int32 [B,L]; for Stable Diffusion XL `input_ids_2` int32 [B,L] and `time_ids` float32 [B,6] too.

    With `encoded`, what the text encoders made of the tokens comes in their place: `prompt_embeds` [B,L,D], and for
    Stable Diffusion XL `pooled_prompt_embeds` [B,P]; float32, float16, or uint16 for the bits of bfloat16.
    """

    tokenize: Tokenize
    xl: XLInputs | None = None
    encoded: EncodedText | None = None

    def __call__(
        self, captions: Sequence[str], sizes_B6: npt.NDArray[np.float32] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """`sizes_B6` are those of each caption's image, which count where no others are set.

        Raises:
            UserError: for what is no text.
        """
        token_ids = self.token_ids(captions)
        arrays: dict[str, npt.NDArray[Any]] = dict(token_ids) if self.encoded is None else self.encoded(token_ids)
        if self.xl is not None:
            if self.xl.sizes is not None:
                sizes_B6 = np.tile(np.array(self.xl.sizes, np.float32), (len(captions), 1))
            assert sizes_B6 is not None, "where every image has its own sizes, they are given with the captions"
            arrays["time_ids"] = sizes_B6
        return arrays

    def token_ids(self, captions: Sequence[str]) -> TokenIds:
        """UserError for what is no text."""
        first = {"input_ids": self.tokenize(captions)}
        return first if self.xl is None else first | {"input_ids_2": self.xl.tokenize(captions)}

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """See `XLInputs`."""
        return self.xl is not None and self.xl.zeros_for_empty_prompt

    def of_whole_images(self, height: int, width: int) -> "PromptInputs":
        """For sampling: nothing is cut off at the top and left, as diffusers' pipelines ask for an image."""
        return self if self.xl is None else replace(self, xl=replace(self.xl, sizes=sizes_of_image(height, width)))

    def of_crops(self, height: int, width: int) -> "PromptInputs":
        """For training on crops of that size: where all images are told the same sizes, those are its own."""
        if self.xl is None or self.xl.sizes is None:
            return self
        _, _, top, left, _, _ = self.xl.sizes
        return replace(self, xl=replace(self.xl, sizes=(height, width, top, left, height, width)))

    def report(self) -> None:
        """Say in the log how many captions were cut, if any; SDXL's tokenizers cut at the same length."""
        if isinstance(self.tokenize, CaptionTokenizer):
            self.tokenize.report()


def tokenizer_function(tokenizer: CLIPTokenizer) -> "CaptionTokenizer":
    """captions → input_ids int32 [B,L], padded to model_max_length and truncated there."""
    return CaptionTokenizer(tokenizer)


def used_text(tokenize: Tokenize, text: str) -> str:
    """The part of a caption that its tokens hold, marked where it is cut; all of it where nothing is known of that."""
    if not isinstance(tokenize, CaptionTokenizer):
        return text
    used = tokenize.used(text)
    return text if used == text else f"{used} […]"


class CaptionTokenizer:
    """captions → input_ids int32 [B,L], padded to model_max_length and truncated there; counts what is cut off.

    Safe to use from several threads, which take turns: the tokenizer keeps its padding settings in itself.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self._tokenizer, self._length = tokenizer, tokenizer.model_max_length
        self._keeps_end = tokenizer.truncation_side == "left"
        longest = min(max(map(len, tokenizer.get_vocab()), default=1), _LONGEST_TOKEN)
        # An entry of the vocabulary stands for at most as many characters as it has, and a space after them. Composing
        # characters (NFC) makes one of up to three.
        self._most_characters = 4 * (longest + 1) * self._length
        self._captions, self._cut = 0, 0
        self._lock = threading.RLock()

    def __call__(self, captions: Sequence[str]) -> npt.NDArray[np.int32]:
        """Says once in the log that a caption was too long. UserError for what is no text."""
        with self._lock:
            encoded = self._encode(captions)
            self._captions += sum(map(bool, captions))
            for caption, encoding in zip(captions, encoded.encodings or (), strict=False):
                if encoding.overflowing:
                    self._count_cut(caption)
        return np.asarray(encoded["input_ids"], dtype=np.int32)

    def used(self, text: str) -> str:
        """The part of a text that its tokens hold: the text itself where nothing is cut off."""
        (encoding,) = self._encode([text]).encodings
        held = [span for span in encoding.offsets if span[1] > span[0]]
        if not encoding.overflowing or not held:
            return text
        possible = self._possible(text)
        return possible[held[0][0] :] if self._keeps_end else possible[: held[-1][1]]

    def report(self) -> None:
        """Say in the log how many captions were cut, if any."""
        if self._cut:
            logger.warning(
                "%d of %d captions and prompts had more than %d tokens; only those were used",
                self._cut,
                self._captions,
                self._length,
            )

    def _encode(self, captions: Sequence[str]) -> Any:
        for caption in captions:
            try:
                check_text(caption)
            except BadSampleError as error:
                raise UserError(f"the caption {shown(caption)!r} cannot be used: {error}") from None
        with self._lock, foreign_library("a caption cannot be tokenised", "Check the tokenizer's files."):
            return self._tokenizer(
                list(map(self._possible, captions)), max_length=self._length, padding="max_length", truncation=True
            )

    def _possible(self, caption: str) -> str:
        """The part of a caption that can matter: tokenising a book takes minutes, and `_length` tokens are used."""
        most = self._most_characters
        if len(caption) <= most:
            return caption
        return _beginning(caption[::-1], most)[::-1] if self._keeps_end else _beginning(caption, most)

    def _count_cut(self, caption: str) -> None:
        self._cut += 1
        if self._cut == 1:
            logger.warning(
                "a caption or prompt has more than the %d tokens that the text encoder takes, and is cut after %r. "
                "This is said once; the number of such captions comes at the end",
                self._length,
                shown(self.used(caption)),
            )


def _beginning(caption: str, most: int) -> str:
    """Whole words of a long caption, or the first of one that is longer than that, with single spaces between them."""
    words: list[str] = []
    length = 0
    for found in _WORD.finditer(caption):
        words.append(caption[found.start() : min(found.end(), found.start() + most)])
        length += len(words[-1]) + 1
        if length > most:
            break
    return " ".join(words)
