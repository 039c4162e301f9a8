"""Which object it is that lies at an address, so that one that is replaced while it is read is noticed."""

from dataclasses import dataclass, field

from shared.data.remote.faults import RemoteError


@dataclass(frozen=True)
class Identity:
    """
    Attributes:
        size: in bytes.
        version: its ETag, hash or time, None where the store tells none.
    """

    size: int
    version: str | None

    def check(self, now: "Identity") -> None:
        """Raises RemoteError where another object has taken its place."""
        if self.size != now.size:
            raise RemoteError(f"it has changed while it was read: from {self.size:,} to {now.size:,} bytes")
        if self.version is not None and now.version is not None and self.version != now.version:
            raise RemoteError("it has changed while it was read")


@dataclass
class Reading:
    """What has come of a range so far, and is kept when a try fails.

    Attributes:
        identity: of the object; None until a first answer tells.
        content: of the range, from its begin.
    """

    identity: Identity | None = None
    content: bytearray = field(default_factory=bytearray)
