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


class Sparing:
    """Around the writing of pictures: an error of the disk is a warning, once per kind of picture."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    @contextmanager
    def spare(self, kind: str) -> Iterator[None]:
        """`kind` is what is missing if this fails, in the plural."""
        try:
            yield
        except OSError as error:
            if kind not in self._said:
                logger.warning(
                    "%s cannot be written (%s) and are missing as long as that lasts; the training goes on",
                    *(kind, error.strerror or error),
                )
            self._said.add(kind)
