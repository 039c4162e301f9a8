"""What the tests of whole runs share."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from flax_trainer.random_model import write_random_model
from shared.data.sources.circles import draw
from tests.end_to_end.support.tiny_runs import ONE_RESOLUTION, ONE_RESOLUTION_XL, SIZE


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


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest one that can be trained, in the place of `tiny`."""
    folder = tmp_path_factory.mktemp("base-model")
    write_random_model(ONE_RESOLUTION, folder)
    return folder


@pytest.fixture(scope="session")
def xl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest one of its kind that can be trained, in the place of `tiny_xl`."""
    folder = tmp_path_factory.mktemp("xl-model")
    write_random_model(ONE_RESOLUTION_XL, folder)
    return folder
