"""A loopback proxy before the bucket, which can be slow, sparing, silent or wrong, also to what is written."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests

CHUNK_BYTES = 65536
PATIENCE_SECONDS = 2.0


@dataclass
class Proxy:
    """How it behaves; may be changed while it runs."""

    target: str
    address: str = ""
    delay_seconds: float = 0.0
    """Before each answer."""
    bytes_per_second: float = 0.0
    """Of each answer's body, 0 without bound."""
    fault: int | str | None = None
    """A status to answer with, "silence" or "cut"."""
    cut_writes: range = range(0)
    """The writes, counted from 0, whose connection is cut."""
    cut_answers: bool = False
    """Whether only the answer is lost: what was written is there."""
    writes: int = 0
    begun: list[tuple[float, float, str]] = field(default_factory=list)
    """When each request came and was answered, and its path."""

    def count_in_a_row(self) -> int:
        """The longest chain of requests of which each began after the one before it had ended."""
        chain, ended = 0, 0.0
        for came, answered, _ in sorted(self.begun, key=lambda request: request[1]):
            if came >= ended:
                chain, ended = chain + 1, answered
        return chain


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    stopped: threading.Event

    def do_GET(self):
        came, proxy = time.monotonic(), self.proxy
        time.sleep(proxy.delay_seconds)
        if proxy.fault == "silence":
            self.stopped.wait(PATIENCE_SECONDS)
            self.close_connection = True
            return
        if isinstance(proxy.fault, int):
            self._send(proxy.fault, b'{"error": "as told"}')
            return
        headers = {"Accept-Encoding": "identity"}
        answer = requests.get(proxy.target + self.path, headers=headers, timeout=30)
        self._send(answer.status_code, answer.content, answer.headers)
        proxy.begun.append((came, time.monotonic(), self.path))

    def do_POST(self):
        proxy = self.proxy
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        number, proxy.writes = proxy.writes, proxy.writes + 1
        cut = number in proxy.cut_writes
        if proxy.cut_answers or not cut:
            kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
            answer = requests.post(proxy.target + self.path, data=content, headers=kept, timeout=30)
        if cut:
            self.close_connection = True
            self.connection.close()
            return
        self._send(answer.status_code, answer.content)

    def _send(self, status, content, headers=()):
        self.send_response(status)
        for name in headers:
            if name.lower().startswith("x-goog-"):
                self.send_header(name, headers[name])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.proxy.fault == "cut":
            content, self.close_connection = content[: len(content) // 2], True
        for at in range(0, len(content), CHUNK_BYTES):
            part = content[at : at + CHUNK_BYTES]
            self.wfile.write(part)
            if self.proxy.bytes_per_second:
                time.sleep(len(part) / self.proxy.bytes_per_second)

    def log_message(self, *_):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass  # a killed function's connections


@contextmanager
def run_proxy(target: str, **behaviour) -> Iterator[Proxy]:
    """A proxy before `target` until the block ends."""
    proxy = Proxy(target, **behaviour)
    handler = type("Handler", (_Handler,), {"proxy": proxy, "stopped": threading.Event()})
    server = _Server(("127.0.0.1", 0), handler)
    proxy.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield proxy
    finally:
        handler.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
