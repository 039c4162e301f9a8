"""What the comparisons of both backends share."""

from pathlib import Path

import pytest

from flax_trainer.random_model import write_random_model
from tests.end_to_end.support.tiny_runs import ONE_RESOLUTION_XL


@pytest.fixture(scope="session")
def xl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest one of its kind, which compiles in half the time of `tiny_xl`: tests of steps have that one."""
    folder = tmp_path_factory.mktemp("xl-model")
    write_random_model(ONE_RESOLUTION_XL, folder)
    return folder
