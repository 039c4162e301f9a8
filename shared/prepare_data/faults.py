"""What may be wrong with a sample, as `check` looks at it.

H height, W width of a picture in pixels.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL.Image

from shared.data.conditions import numbered_conditions
from shared.data.preprocessing import decode
from shared.data.sample import BadSampleError, RawSample
from shared.data.views import are_of_one_shape

FaultKind = Literal["corrupt", "mismatched", "duplicated", "small", "long"]

LONGEST = 2.0
"""Of a picture whose longer side is more than so many times the shorter, the crop leaves less than half."""

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Fault:
    """One fault of one sample, in words."""

    kind: FaultKind
    sample: str
    detail: str


@dataclass(frozen=True)
class Examined:
    """A sample that was looked at. `digest`: of the pixels of all its pictures, empty where it is corrupt."""

    name: str
    faults: tuple[Fault, ...]
    digest: bytes


def examined(sample: RawSample, resolution: int) -> Examined:
    """Decode a sample's pictures, and look for what is wrong with it by itself."""
    try:
        sample.check()
        image, *conditions = map(decode, (sample.picture, *sample.conditions))
    except BadSampleError as error:
        return Examined(sample.name, (Fault("corrupt", sample.name, str(error)),), b"")
    faults = tuple(_faults(sample.name, image, conditions, resolution))
    return Examined(sample.name, faults, _digest(image) + _digest(*conditions))


def duplicates(digests: bytes) -> Iterator[tuple[int, int]]:
    """(number, number of the first of its kind) of each that was there before; two digests a sample, in its order."""
    pairs = np.frombuffer(digests, np.dtype((np.void, 2 * DIGEST_BYTES)))
    _, firsts, kinds = np.unique(pairs, return_index=True, return_inverse=True)
    for number in np.flatnonzero(firsts[kinds] != np.arange(len(pairs))):
        yield int(number), int(firsts[kinds[number]])


def _faults(
    name: str, image: PIL.Image.Image, conditions: Sequence[PIL.Image.Image], resolution: int
) -> Iterator[Fault]:
    size = f"{image.width}x{image.height}"
    for words, condition in zip(numbered_conditions(len(conditions)), conditions, strict=True):
        if not are_of_one_shape(image.size, condition.size, resolution):
            other = f"{condition.width}x{condition.height}"
            yield Fault(
                "mismatched", name, f"its image has {size} pixels and its {words} {other}: other parts are cropped"
            )
    if min(image.size) < resolution:
        yield Fault("small", name, f"its image has {size} pixels, and is enlarged to {resolution}")
    if max(image.size) > LONGEST * min(image.size):
        yield Fault("long", name, f"its image has {size} pixels, and most of it is cropped away")


def _digest(*pictures: PIL.Image.Image) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for picture in pictures:
        digest.update(np.asarray(picture).tobytes())
        digest.update(f"{picture.width}x{picture.height}".encode())
    return digest.digest()
