"""What the tests of a run's surroundings share."""

from collections.abc import Iterator

import pytest

from tests.shared.run.fake_hub import FakeHub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with serving(monkeypatch, tmp_path_factory.mktemp("nobody")) as fake:
        yield fake
