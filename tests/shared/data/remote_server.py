"""An HTTP server on this machine with ranges, and with every fault that a test asks for."""

import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class Request:
    """One that came, and the answer that would be right; a fault changes it.

    Attributes:
        path: of the object.
        number: how many requests for it came before.
        begin: of the range; None where the whole is asked for.
        status: of the answer.
        headers: of the answer.
        body: of the answer.
        sent: bytes of the body after which the connection is dropped; None for none.
        endless: whether the body goes on for ever.
    """

    path: str
    number: int
    begin: int | None
    status: int
    headers: dict[str, str]
    body: bytes
    sent: int | None = None
    endless: bool = False

    @property
    def end(self) -> int:
        """Of the range."""
        return (self.begin or 0) + len(self.body)

    def fail(self, status: int) -> None:
        self.status, self.headers, self.body = status, {"Content-Length": "0"}, b""

    def drop_after(self, count: int) -> None:
        self.sent = count

    def answer_whole(self, content: bytes) -> None:
        self.status, self.body = 200, content
        self.headers = {"Content-Length": str(len(content)), "ETag": '"one"'}

    def claim(self, begin: int, end: int, size: int) -> None:
        """Say that the body is another range, or of another object."""
        self.headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"


Fault = Callable[[Request], None]


@dataclass
class Server:
    """
    Attributes:
        address: without a slash at the end.
        objects: what it holds, by path.
        fault: changes the answers.
        requests: that came, by path.
        bytes: sent of bodies, by path.
    """

    address: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    fault: Fault = lambda request: None
    requests: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


@contextmanager
def running_server() -> Iterator[Server]:
    served = Server()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or else an answer's second packet waits for 40 ms

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            with lock:
                number = served.requests[path]
                served.requests[path] += 1
            request = right_answer(path, number, served.objects.get(path), self.headers.get("Range"))
            served.fault(request)
            self.send_response(request.status)
            for name, value in request.headers.items():
                self.send_header(name, value)
            self.end_headers()
            body = request.body if request.sent is None else request.body[: request.sent]
            try:
                self.wfile.write(body)
                while request.endless:
                    self.wfile.write(bytes(2**16))
                    served.bytes[path] += 2**16
            except ConnectionError:  # the client has had enough
                self.close_connection = True
            served.bytes[path] += len(body)
            if request.sent is not None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *arguments: object) -> None:
            pass

    class QuietServer(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            if not isinstance(sys.exc_info()[1], ConnectionError):  # of a client that has had enough
                super().handle_error(request, client_address)  # type: ignore[arg-type]

    server = QuietServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    served.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def right_answer(path: str, number: int, content: bytes | None, asked: str | None) -> Request:
    if content is None:
        return Request(path, number, None, 404, {"Content-Length": "0"}, b"")
    headers = {"Content-Length": str(len(content)), "ETag": '"one"', "Accept-Ranges": "bytes"}
    found = _RANGE.fullmatch(asked or "")
    if found is None:
        return Request(path, number, None, 200, headers, content)
    begin, end = int(found[1]), min(int(found[2]) + 1, len(content))
    if begin >= len(content):
        return Request(path, number, begin, 416, {"Content-Length": "0"}, b"")
    headers |= {"Content-Length": str(end - begin), "Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}
    return Request(path, number, begin, 206, headers, content[begin:end])
