"""How long the devices worked in a trace, by part of the model and by kind of work."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from shared.outgoing.atomic_files import write_text_atomically
from shared.profiling.kinds import Kind

logger = logging.getLogger(__name__)

FILE = "device_time.json"
OUTSIDE = "other"


class Piece(NamedTuple):
    """A kernel, a copy or an operation. `part` is None outside of all parts, `nanoseconds` what it took by itself."""

    part: str | None
    kind: Kind
    nanoseconds: float


@dataclass(frozen=True)
class DeviceTime:
    """Seconds per step, most first; either dict adds up to `total`.

    Attributes:
        by_part: of `shared.profiling.parts.PARTS`, forward and backward ("unet backward") apart, and `OUTSIDE`.
        by_kind: of `shared.profiling.kinds.Kind`.
        total: what runs at the same time, on several streams or threads, counts for each.
    """

    by_part: dict[str, float]
    by_kind: dict[str, float]
    total: float

    @classmethod
    def of(cls, pieces: Iterable[Piece], steps: int) -> "DeviceTime":
        """The mean over so many whole steps."""
        by_part: dict[str, float] = defaultdict(float)
        by_kind: dict[str, float] = defaultdict(float)
        for part, kind, nanoseconds in pieces:
            by_part[part or OUTSIDE] += nanoseconds / 1e9 / steps
            by_kind[kind] += nanoseconds / 1e9 / steps
        return cls(_most_first(by_part), _most_first(by_kind), sum(by_part.values()))

    def tell(self, folder: Path) -> None:
        """In the log and, for programs, in `folder`.

        Raises:
            OSError: it cannot be written.
        """
        write_text_atomically(folder / FILE, json.dumps(asdict(self), indent=2) + "\n")
        for title, shares in (("part", self.by_part), ("kind of work", self.by_kind)):
            told = ", ".join(f"{name} {seconds / self.total:.0%}" for name, seconds in shares.items())
            logger.info("%.3g ms of device time per step, by %s: %s", self.total * 1e3, title, told)


def _most_first(seconds: dict[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda entry: -entry[1]))
