"""Where the samples of a tar lie in it."""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shared.outgoing.redaction import redacted

HEADER = tarfile.BLOCKSIZE
"""The bytes of the header that stands right before a member's content."""


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """A shard at an address. As a text, it is without what may be secret in that.

    Attributes:
        address: where it lies.
        size: in bytes, as an index has it; None where none says.
    """

    address: str
    size: int | None = None

    @property
    def name(self) -> str:
        """Its last part, as a path's."""
        return str(self).rpartition("/")[2]

    @property
    def folder(self) -> str:
        """What stands before that."""
        return str(self).rpartition("/")[0]

    def __str__(self) -> str:
        return redacted(self.address)


Shard = Path | RemoteShard


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member's content lies in its shard. `header` is the CRC-32 of its header, None where that can be read
    again at no cost and was read just now, not by an earlier program."""

    extension: str
    offset: int
    size: int
    header: int | None = None


@dataclass(frozen=True, slots=True)
class IndexedSample:
    """Where the parts of a sample lie."""

    shard: Shard
    key: str
    image: Member | None
    conditioning_images: tuple[Member | None, ...]
    caption: Member | None

    @classmethod
    def of_parts(cls, shard: Shard, key: str, parts: Sequence[Member | None]) -> Self:
        """`parts`: in the order of `parts` below."""
        return cls(shard, key, parts[0], tuple(parts[1:-1]), parts[-1])

    @property
    def parts(self) -> tuple[Member | None, ...]:
        """Image, conditions, caption."""
        return self.image, *self.conditioning_images, self.caption
