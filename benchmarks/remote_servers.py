"""Servers for benchmarks.remote_throughput, each a process of its own: every answer waits for --latency first.

    python3 -m benchmarks.remote_servers http --folder FOLDER [--latency 0.02]
    python3 -m benchmarks.remote_servers s3 [--latency 0.02]

The first line on standard output is the port on 127.0.0.1. They end with their standard input.
"""

import argparse
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["http", "s3"])
    parser.add_argument("--folder", type=Path, help="what the HTTP server holds")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before every answer")
    arguments = parser.parse_args()
    server = http_server(arguments.folder, arguments.latency) if arguments.kind == "http" else s3(arguments.latency)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


def http_server(folder: Path, latency: float) -> ThreadingHTTPServer:
    """Files with ranges, from the kernel straight to the connection."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            time.sleep(latency)
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            size = path.stat().st_size
            found = _RANGE.fullmatch(self.headers.get("Range", ""))
            begin, end = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
            self.send_response(206 if found else 200)
            if found:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.send_header("Content-Length", str(end - begin))
            self.end_headers()
            with path.open("rb") as file:
                self.connection.sendfile(file, begin, end - begin)

        def log_message(self, *arguments: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def s3(latency: float) -> Any:
    """moto's S3, which holds everything in memory."""
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

    def delayed(environment: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        time.sleep(latency)
        return application(environment, start_response)

    return make_server("127.0.0.1", 0, delayed, threaded=True, request_handler=Handler)


if __name__ == "__main__":
    main()
