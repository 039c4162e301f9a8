"""A small Hub of our own on 127.0.0.1."""

import base64
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

WRITER, READER = "hf_writer", "hf_reader"


@dataclass
class FakeHub:
    """Two users' tokens, the repositories that exist, and the files that were committed to them.

    Like the Hub, it answers 401 to strangers, 403 to those who may only read, 409 for a repository that exists.

    Attributes:
        faults: the statuses that the next requests at paths with `faulty` in them get instead; 0 breaks off.
        retry_after: the seconds that whoever gets one is asked to wait.
    """

    repositories: set[str] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    address: str = ""
    broken: bool = False
    faults: list[int] = field(default_factory=list)
    faulty: str = ""
    retry_after: int | None = None

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, dict[str, object]]:
        self.requests.append(f"{method} {path}")
        if self.broken:
            return 503, {"error": "down for maintenance"}
        if self.faults and self.faulty in path:
            return self.faults.pop(0), {"error": "for a moment"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        repository = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if repository not in self.repositories:
            return 404, {"error": "Repository not found"}
        if method == "GET" and path == f"/api/models/{repository}":
            return 200, {"id": repository}  # public: anyone may look
        if (refused := self._refused(token)) is not None:
            return refused
        if path.endswith("/preupload/main"):
            wanted = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
        if path.endswith("/commit/main"):
            self._commit(body)
            url = f"{self.address}/{repository}/commit/abc"
            return 200, {"success": True, "commitOid": "abc", "commitUrl": url}
        assert path.endswith("/auth-check/write"), path
        return 200, {}

    def _refused(self, token: str | None) -> tuple[int, dict[str, object]] | None:
        if token == WRITER:
            return None
        return (403, {"error": "You may only read"}) if token == READER else (401, {"error": "Invalid credentials"})

    def _create(self, wanted: dict[str, str | None], token: str | None) -> tuple[int, dict[str, object]]:
        if (refused := self._refused(token)) is not None:
            return refused
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        known = name in self.repositories
        self.repositories.add(name)
        return 409 if known else 200, {"url": f"{self.address}/{name}"}

    def _commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])


@contextmanager
def serve(fake: FakeHub) -> Iterator[str]:
    """The address at which it answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            authorization = self.headers.get("authorization")
            token = authorization and authorization.removeprefix("Bearer ")
            status, content = fake.answer(self.command, self.path.partition("?")[0], token, body)
            if status == 0:
                self.close_connection = True
                return
            answer = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            if status == 429 and fake.retry_after is not None:
                self.send_header("retry-after", str(fake.retry_after))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = answer

        def log_message(self, format: str, *args: object) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            if not isinstance(sys.exc_info()[1], ConnectionError):  # whoever asked may have been killed
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    fake.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake.address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[FakeHub]:
    """Online, with nobody logged in."""
    fake = FakeHub()
    with serve(fake) as address:
        connect_to(monkeypatch, address, home)
        yield fake
        huggingface_hub.close_session()


def connect_to(monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """Online, at this address, with nobody logged in; the variables of the environment were read at import."""
    huggingface_hub.close_session()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    log_out(monkeypatch, home)


def log_out(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "token"))
