"""Counting the samples that could not be used."""

import itertools
import logging
import threading

from shared.data.sample import BadSampleError
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_NAMED_IN_ERROR = 5
_LONGEST_REASON = 1500  # a sentence with two paths in it, each already cut


class SkippedSamples:
    """The distinct bad samples this process met, each logged once. Safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, name: str, error: BadSampleError) -> None:
        """Count a bad sample. UserError, naming some, when there are now more than the limit."""
        with self._lock:
            if name in self._reasons:
                return
            self._reasons[name] = str(error)
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
        )
