"""A stream's lanes: which rows of a step come from which, so that hosts read different ones.

Axes: A microbatches of a step, B rows of a microbatch on a host.
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.data.candidates import Candidates, StreamCandidates
from shared.data.sample import RawSample
from shared.data.sources.base import StreamsInLanes

logger = logging.getLogger(__name__)


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
        """The lanes of a host, given its positions in a step."""
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
        self._has_begun = False

    def at(self, position: int) -> Iterator[RawSample]:
        lane, number = self._layout.place(position)
        return self._lanes[lane].at(number)

    def expect(self, positions: Iterable[int]) -> None:
        """At first, all lanes begin at once; from then on each reads ahead by itself."""
        if self._has_begun:
            return
        self._has_begun = True
        first: dict[int, int] = {}
        for lane, number in map(self._layout.place, positions):
            first.setdefault(lane, number)
        for lane, number in first.items():
            threading.Thread(target=self._lanes[lane].begin_at, args=(number,), name="lane", daemon=True).start()

    def forget_before(self, position: int) -> None:
        """See `StreamCandidates.forget_before`; of a step's first position."""
        for lane in self._lanes.values():
            lane.forget_before(position // self._layout.count)


def candidates_in_lanes(
    source: StreamsInLanes,
    positions_of_hosts: Sequence[npt.NDArray[np.int64]],
    process_index: int,
    max_skipped_samples: int,
) -> Candidates:
    """Those of a host's own lanes. Says in the log where hosts have to read the same.

    Args:
        source: divided into as many lanes as it allows and the rows of a step can.
        positions_of_hosts: [A,B] of every host, in one step.
        process_index: of the host.
        max_skipped_samples: see `StreamCandidates`.
    """
    layout = LaneLayout.of_steps(sum(positions.size for positions in positions_of_hosts), source.most_lanes)
    lanes_of_hosts = list(map(layout.of_host, positions_of_hosts))
    read = sum(map(len, lanes_of_hosts))
    if read > layout.count:
        logger.warning(
            "%d hosts cannot divide the shards evenly (lanes: %d): together they read them %.1f times. An index lets "
            "each read its own samples of remote shards alone: python3 -m shared.prepare_data index ADDRESSES "
            "--output_file FILE, to be laid beside the first of them",
            len(lanes_of_hosts),
            layout.count,
            read / layout.count,
        )
    if layout.count == 1:
        return StreamCandidates(source, max_skipped_samples)
    return LaneCandidates(source, layout, lanes_of_hosts[process_index], max_skipped_samples)
