"""What the tests of whole runs share."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.data.sources.circles import draw
from tests.end_to_end.support.tiny_runs import SIZE


@pytest.fixture(autouse=True)
def _own_log_handlers() -> Iterator[None]:
    """An entry point that is called in this process leaves one behind that writes to the captured output of a test."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before


@pytest.fixture(scope="session")
def condition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of an outline that is in no training data."""
    path = tmp_path_factory.mktemp("validation") / "condition.png"
    draw(0, SIZE, seed=1).conditioning_image.save(path)
    return path
