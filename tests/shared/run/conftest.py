"""What the tests of a run's surroundings share."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from shared.run import hub_retries
from tests.shared.run.fake_hub import FakeHub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """Without pauses between tries, ours and those of huggingface_hub."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    for name in ("BEFORE_THE_WORK", "AFTER_THE_WORK"):
        monkeypatch.setattr(hub_retries, name, [0.0] * len(getattr(hub_retries, name)))
    with serving(monkeypatch, tmp_path_factory.mktemp("nobody")) as fake:
        yield fake
