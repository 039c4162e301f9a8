"""A TensorBoard on a free port, as a user starts it."""

import gzip
import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.end_to_end.support.running import free_port


class TensorBoard:
    """What answers at an address."""

    def __init__(self, address: str):
        self.address = address

    def get(self, path: str, **query: str) -> bytes:
        with urllib.request.urlopen(f"{self.address}/{path}?{urllib.parse.urlencode(query)}", timeout=120) as answer:
            content = answer.read()
            # xprof compresses its answers without being asked to.
            return gzip.decompress(content) if answer.headers["Content-Encoding"] == "gzip" else content

    def get_json(self, path: str, **query: str) -> Any:
        return json.loads(self.get(path, **query))


def trace_viewer(server: TensorBoard, trace: str) -> str:
    """The address that shows a trace (by its name in the Profile tab) in the trace viewer."""
    return f"{server.address}/?{urllib.parse.urlencode({'run': trace, 'tool': 'trace_viewer@'})}#profile"


@contextmanager
def tensorboard(folder: Path, *, timeout: float = 120) -> Iterator[TensorBoard]:
    """Runs while it is needed."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", str(port), "--host", "127.0.0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        server = TensorBoard(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + timeout
        while not _answers(server):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _answers(server: TensorBoard) -> bool:
    try:
        return bool(server.get_json("data/plugins_listing"))
    except urllib.error.URLError:
        return False
