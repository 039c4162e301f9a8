"""A stream's lanes: which rows of a step come from which, so that hosts read different ones.

Axes: A microbatches of a step, B rows of a microbatch on a host.
"""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from shared.data.candidates import StreamCandidates
from shared.data.sample import RawSample
from shared.data.sources.base import StreamsInLanes
from shared.data.workers import Workers


@dataclass(frozen=True)
class LaneLayout:
    """Lanes are runs of equally many neighbouring rows of a step.

    So the order depends on the rows of a step alone; and where `count` is a multiple of hosts × microbatches, no two
    hosts have rows of one lane, for each has a run of rows in every microbatch.

    Attributes:
        count: of the lanes.
        width: the rows of each.
    """

    count: int
    width: int

    @classmethod
    def of_steps(cls, rows: int, most: int) -> "LaneLayout":
        """As many as divide the `rows` of a step, up to `most`: twos first, for mostly hosts come in powers of two."""
        count = 1
        while 2 * count <= most and rows % (2 * count) == 0:
            count *= 2
        odd = next(odd for odd in range(most // count, 0, -1) if rows % (odd * count) == 0)
        return cls(odd * count, rows // (odd * count))

    def place(self, position: int) -> tuple[int, int]:
        """The lane of a position, and its number there."""
        step, row = divmod(position, self.count * self.width)
        lane, offset = divmod(row, self.width)
        return lane, step * self.width + offset

    def of_host(self, positions_AB: npt.NDArray[np.int64]) -> list[int]:
        """The lanes of a host, given its positions in any step."""
        return [int(lane) for lane in np.unique(positions_AB % (self.count * self.width) // self.width)]


class LaneCandidates:
    """Windows on a host's lanes. A bad sample is replaced by the next ones of its lane."""

    def __init__(self, source: StreamsInLanes, layout: LaneLayout, own: list[int], max_skipped_samples: int) -> None:
        """`own`: the lanes that are read."""
        self._layout = layout
        self._lanes = {
            number: StreamCandidates(lane, max_skipped_samples)
            for number, lane in source.lanes(layout.count, own).items()
        }
        self._starting: Workers | None = None

    def at(self, position: int) -> Iterator[RawSample]:
        lane, number = self._layout.place(position)
        return self._lanes[lane].at(number)

    def expect(self, positions: Iterable[int]) -> None:
        """At first, all lanes begin at once; from then on each reads ahead by itself."""
        if self._starting is not None:
            return
        self._starting = Workers(len(self._lanes))
        weakref.finalize(self, self._starting.close)
        first: dict[int, int] = {}
        for lane, number in map(self._layout.place, positions):
            first.setdefault(lane, number)
        for lane, number in first.items():
            self._starting.submit(partial(self._lanes[lane].go_to, number))

    def forget_before(self, position: int) -> None:
        """See `StreamCandidates.forget_before`; of a step's first position."""
        for lane in self._lanes.values():
            lane.forget_before(position // self._layout.count)
