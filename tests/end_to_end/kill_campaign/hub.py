"""A Hub on this machine that takes its time over an upload, so that a run can be killed meanwhile."""

import threading
import time

from tests.shared.run.fake_hub import FakeHub

_SECONDS = 0.4


class Hub(FakeHub):
    """One of a run."""

    def __init__(self) -> None:
        super().__init__()
        self._receiving = threading.Event()

    def is_receiving(self) -> bool:
        """Whether it has an upload and has not answered."""
        return self._receiving.is_set()

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, dict[str, object]]:
        if not path.endswith("/commit/main"):
            return super().answer(method, path, token, body)
        self._receiving.set()
        try:
            time.sleep(_SECONDS)
            return super().answer(method, path, token, body)
        finally:
            self._receiving.clear()
