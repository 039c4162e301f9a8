"""A profile that cannot be made or written is a warning, and the training goes on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.untrusted import foreign_library

logger = logging.getLogger(__name__)


@contextmanager
def only_watching(what: str) -> Iterator[None]:
    """Around whatever makes or writes a profile, which `what` names as the beginning of a sentence."""
    try:
        with foreign_library(f"{what} cannot be written", "The training goes on without."):
            yield
    except ValueError as error:
        logger.warning("%s", error)


def say_where(trace: Path, traces: Path) -> None:
    """Say in the log that a trace is in the folder `trace`, which TensorBoard finds from the folder `traces` on."""
    logger.info("A trace is in %s; look at it with tensorboard --logdir %s, in the Profile tab", trace, traces)
