"""A web server on this machine that gives files, and fails as it is told to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ShardServer:
    """files: content by path ("/a.tar"). faults: what the next answers to a GET of a path are instead of the file: a
    status, "drop" (the connection is closed in the middle), "cut" (a length that is too short is stated), "hang".
    asked: how often each path was asked for; etags: by path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.asked: Counter[str] = Counter()
        self.etags: dict[str, str] = {}
        self.retry_after: str | None = None
        self.queries: set[str] = set()
        self.lock = threading.Lock()
        self.address = ""


@contextmanager
def serving() -> Iterator[ShardServer]:
    """The server, while the block lasts."""
    server = ShardServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path, _, query = self.path.partition("?")
            with server.lock:
                if body:
                    server.asked[path] += 1
                server.queries.add(query)
                fault = server.faults[path].pop(0) if body and server.faults.get(path) else None
            content = server.files.get(path)
            if content is None or isinstance(fault, int):
                self.send_response(404 if fault is None else int(fault))
                if server.retry_after is not None:
                    self.send_header("Retry-After", server.retry_after)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "hang":
                time.sleep(3)
            if fault == "cut":
                content = content[: len(content) // 2]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{server.etags.get(path, hash(content))}"')
            self.end_headers()
            if body:
                self.wfile.write(content[: len(content) // 2] if fault == "drop" else content)
            if fault == "drop":
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Of a client that went away, nothing is said."""

    web = Quiet(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    server.address = f"http://127.0.0.1:{web.server_address[1]}"
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()
