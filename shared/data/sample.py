"""What every source yields, one undecoded training pair, and the count of those that could not be used."""

import itertools
import logging
import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from shared.untrusted import shown
from shared.user_errors import UserError

if TYPE_CHECKING:
    from shared.data.cached_latents import CachedImage

logger = logging.getLogger(__name__)

EncodedImage = bytes | Path | str | PIL.Image.Image
"""An image before decoding: a file's content, a local path, an address that `shared.data.addresses` reads, or an image
drawn by a source."""

MOST_CAPTIONS = 10_000
"""Of one sample. Datasets with several captions have five, some a hundred."""

NO_CAPTIONS = "(none)"
"""In place of the column or key of captions, where images are wanted that may have none: they are about to be made."""

_NAMED_IN_ERROR = 5
_LONGEST_REASON = 1500  # a sentence with two paths in it, each already cut


class BadSampleError(Exception):
    """This sample cannot be trained on. The message is the reason, worded for a log line that names the sample."""


class MismatchedPairError(BadSampleError):
    """Its image and its condition are of different shapes."""


@dataclass(frozen=True)
class RawSample:
    """One training pair before decoding, cheap enough to read and throw away.

    Attributes:
        image: the picture to be generated, or what a VAE made of it, or None where the source has none.
        conditioning_images: the pictures that steer the generation, one or several, None for each that is not there.
        captions: equally good captions, of which one is drawn per visit. Empty where the source has none.
        name: what a log line calls this sample. The same sample has the same name in every epoch.
        defect: what reading it already found wrong, empty when nothing.
    """

    image: "EncodedImage | CachedImage | None"
    conditioning_images: tuple[EncodedImage | None, ...]
    captions: tuple[str, ...]
    name: str
    defect: str = ""

    @property
    def conditions(self) -> tuple[EncodedImage, ...]:
        """The condition images of a sample that passed `check`."""
        return tuple(image for image in self.conditioning_images if image is not None)

    @property
    def picture(self) -> EncodedImage:
        """The image of a sample that passed `check`, of data whose images are no cache's."""
        assert isinstance(self.image, bytes | Path | str | PIL.Image.Image)
        return self.image

    def check(self) -> None:
        """Raise `BadSampleError` when a part is missing or no text. Decodes nothing."""
        if self.defect:
            raise BadSampleError(self.defect)
        if self.image is None:
            raise BadSampleError("it has no image")
        missing = [number for number, image in enumerate(self.conditioning_images, start=1) if image is None]
        if missing or not self.conditioning_images:
            count = len(self.conditioning_images)
            which = f" {', '.join(map(str, missing))} of {count}" if count > 1 else ""
            raise BadSampleError(f"it has no conditioning image{which}")
        if not self.captions:
            raise BadSampleError("it has no caption")
        if len(self.captions) > MOST_CAPTIONS:
            raise BadSampleError(f"it has more than {MOST_CAPTIONS:,} captions, more than any honest sample")
        for caption in self.captions:
            check_text(caption)


def check_text(caption: str) -> None:
    """Raises BadSampleError for half a surrogate pair, which is no text and has no encoding."""
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSampleError(
            f"its caption holds half a character, which is no text: {shown(caption[error.start : error.start + 20])}"
        ) from None


@dataclass(frozen=True, slots=True)
class NoText:
    """What a row holds where a text should be, in words: "the number 3"."""

    words: str


def captions_of(value: Any) -> tuple[str, ...]:
    """A caption column's value as captions: a text or several. What is missing, of one or of several, is none.

    A number is not taken for its digits: in a column of labels it stands for a name, and pandas makes 3.0 of "3".

    Of more than `MOST_CAPTIONS`, no more are looked at than it takes `RawSample.check` to see it.

    Raises:
        BadSampleError: it is no text.
    """
    if isinstance(value, str):
        return (value,)
    if is_missing(value):
        return ()
    if isinstance(value, Iterable) and not isinstance(value, bytes | dict):
        some = itertools.islice(value, MOST_CAPTIONS + 1)
        captions = tuple(caption for caption in some if not is_missing(caption))
        if all(isinstance(caption, str) for caption in captions):
            return captions
        value = captions
    raise BadSampleError(
        f"its caption is {kind_of(value)}; expected a text. Write it as one, or name another column of captions"
    )


def is_missing(value: Any) -> bool:
    """Whether it is None, or what pandas has for that in tables: a float that is not a number."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def kind_of(value: Any) -> str:
    """In words, what a value is that is no text."""
    match value:
        case NoText(words):
            return words
        case bool():
            return str(value).lower()
        case int():
            return f"the number {value}"
        case float():
            return f"the number {value:g}"
        case bytes():
            return f"{len(value)} bytes"
        case dict():
            return "an object"
        case list() | tuple():
            other = next((item for item in value if not isinstance(item, str) and not is_missing(item)), None)
            if isinstance(other, list | tuple):
                return "a list of lists"
            return "a list" if other is None else f"a list with {kind_of(other)} in it"
        case _:
            return f"of the type {type(value).__name__}"


class SkippedSamples:
    """The distinct bad samples this process met, each logged once. Safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reasons: dict[str, str] = {}
        self._has_mismatched_pairs = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, name: str, error: BadSampleError) -> None:
        """Count a bad sample. UserError, naming some, when there are now more than the limit."""
        with self._lock:
            if name in self._reasons:
                return
            self._reasons[name] = str(error)
            self._has_mismatched_pairs |= isinstance(error, MismatchedPairError)
            logger.warning("skipped %s: %s", shown(name), shown(error, _LONGEST_REASON))
            if len(self) > self._limit:
                raise UserError(self._summary())

    def _summary(self) -> str:
        some = "; ".join(
            f"{shown(name)}: {shown(reason, _LONGEST_REASON)}"
            for name, reason in itertools.islice(self._reasons.items(), _NAMED_IN_ERROR)
        )
        return (
            f"{len(self)} training samples cannot be used, more than --max_skipped_samples={self._limit} allows, "
            f"among them {some}. Repair or remove them, or raise --max_skipped_samples"
            + (
                "; to train on pairs of different shapes, add --mismatched_pairs resize, which stretches conditions "
                "over their images, or crop, which crops either by itself"
                if self._has_mismatched_pairs
                else ""
            )
        )
