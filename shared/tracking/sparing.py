"""What only shows a training may fail without ending it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def result_comes_first(finished: bool) -> Iterator[None]:
    """Around saving a checkpoint: where the training is `finished`, what it trained is smaller and worth more, and is
    still to be saved. A checkpoint that cannot be written is then a warning."""
    try:
        yield
    except ValueError as error:
        if not finished:
            raise
        logger.warning("%s (The training is finished, and its result is saved now.)", error)
