"""Adapters as bytes, and an HTTPS server for them: files with ranges and ETags, and faults that it is told to have."""

import hashlib
import json
import random
import re
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import trustme

from smoa_serve.sources import Cache

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def files_of(seed: int = 0, nbytes: int = 300_000) -> dict[str, bytes]:
    """An adapter as bytes: what is fetched is not looked into."""
    return {
        CONFIG: json.dumps({"peft_type": "LORA", "seed": seed}).encode(),
        WEIGHTS: random.Random(seed).randbytes(nbytes),
    }


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def left_in(cache: Cache) -> list[str]:
    """Everything in the cache's folder but whole entries and notes of them."""
    return sorted(
        str(file.relative_to(cache.root))
        for file in cache.root.rglob("*")
        if file.relative_to(cache.root).parts[0] in ("work", "locks") and file.parent != cache.root
    )


Fault = Callable[["Handler", bytes, int], bool]  # handler, content, where to begin; False: answer as always


class Web(ThreadingHTTPServer):
    """Attributes: files by path; faults of the next reads by path; asked: (path, range) of every request."""

    daemon_threads = True

    def __init__(self, scheme: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scheme = scheme
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.looks: dict[str, list[Fault]] = defaultdict(list)
        self.asked: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.marks = True

    @property
    def url(self) -> str:
        return f"{self.scheme}://localhost:{self.server_port}"

    def reads(self, path: str) -> list[str | None]:
        """Ranges of the requests for a file, without those that only look."""
        return [asked for name, asked in self.asked if name == path and asked != "bytes=0-0"]

    def handle_error(self, *_: object) -> None:
        """Clients leave when they like."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, asked = self.path.partition("?")[0], self.headers.get("Range")
        self.server.asked.append((path, asked))
        self.server.headers.append(dict(self.headers))
        content = self.server.files.get(path)
        begin = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        start = int(begin[1]) if begin else 0
        waiting = (self.server.looks if asked == "bytes=0-0" else self.server.faults)[path]
        if waiting and waiting.pop(0)(self, content or b"", start):
            return
        if content is None:
            self.answer(404, b"nothing here")
        elif begin is None:
            self.answer(200, content)
        elif start >= len(content):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        else:
            self.part(content, start, int(begin[2]) + 1 if begin[2] else len(content))

    def part(self, content: bytes, start: int, end: int | None = None, mark: str | None = None) -> None:
        where = f"bytes {start}-{(end or len(content)) - 1}/{len(content)}"
        self.answer(206, content[start:end], {"Content-Range": where}, mark=mark or etag(content))

    def answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        length: int | None = None,
        mark: str = "",
    ) -> None:
        self.send_response(status)
        if self.server.marks and status in (200, 206):
            self.send_header("ETag", mark or etag(body))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


@contextmanager
def serving(scheme: str, folder: Path | None = None) -> Iterator[Web]:
    """A running server; https with a certificate of an authority whose file is folder/ca.pem."""
    server = Web(scheme)
    if folder is not None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost", "cdn.example", "127.0.0.1").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


# Faults of one read.


def cut(after: int) -> Fault:
    """The connection ends in the middle."""

    def fault(handler: Handler, content: bytes, start: int) -> bool:
        body = content[start:]
        handler.send_response(206 if start else 200)
        handler.send_header("ETag", etag(content))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:after])
        handler.close_connection = True
        return True

    return fault


def status(number: int, **headers: str) -> Fault:
    """Another answer than the file."""

    def fault(handler: Handler, content: bytes, start: int) -> bool:
        handler.answer(number, b"later", {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def drip(nbytes: int, every_s: float) -> Fault:
    """A few bytes at a time."""

    def fault(handler: Handler, content: bytes, start: int) -> bool:
        handler.send_response(206 if start else 200)
        handler.send_header("ETag", etag(content))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        for offset in range(start, len(content), nbytes):
            handler.wfile.write(content[offset : offset + nbytes])
            time.sleep(every_s)
        return True

    return fault


def drip_head(every_s: float) -> Fault:
    """A header line at a time until the client leaves."""

    def fault(handler: Handler, content: bytes, start: int) -> bool:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            handler.wfile.write(b"X-More: 1\r\n")
            time.sleep(every_s)

    return fault


def silent(handler: Handler, content: bytes, start: int) -> bool:
    """No answer at all."""
    time.sleep(3)
    handler.close_connection = True
    return True


def plainly(head: str, body: Callable[[bytes, int], bytes] = lambda content, start: content) -> Fault:
    """An answer whose head is written out."""

    def fault(handler: Handler, content: bytes, start: int) -> bool:
        text = head.replace("ETAG", etag(content)).replace("\n", "\r\n")
        handler.wfile.write(text.encode() + b"\r\n\r\n" + body(content, start))
        handler.close_connection = True
        return True

    return fault
