"""A small HTTP server for tests: serves a directory with ranges, counts what it is asked for, and fails as it is told."""

import http.server
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import unquote, urlsplit

Kind = Literal["status", "reset", "short", "long", "no_ranges", "trickle", "hang", "wrong", "no_length", "other_range"]


@dataclass
class Fault:
    """How answers go wrong.

    Attributes:
        kind: ``status``: answer with it; ``reset``, ``short``: break off in the middle of the body, by RST or FIN; ``long``: send
            more than was asked for; ``no_ranges``: the whole object with 200; ``trickle``: a byte now and then; ``hang``: no answer;
            ``wrong``: other bytes; ``no_length``: whole and chunked; ``other_range``: a range that was not asked for.
        times: For how many requests; None for ever.
    """

    kind: Kind
    times: int | None = None
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None


class Server:
    """Serves ``directory`` on a port of its own while it is a context.

    Attributes:
        requests: (method, path, Range header) of each request.
        bytes_sent: Bytes of bodies.
        connections: How many were opened.
        headers: Header names to values of the last request.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests: list[tuple[str, str, str | None]] = []
        self.headers: dict[str, str] = {}
        self.bytes_sent = self.connections = 0
        self.stopping = threading.Event()
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()
        self._server = _Quiet(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """Where the directory is served, without a slash at the end."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, path: str, kind: Kind, times: int | None = None, **options: object) -> None:
        """Let the next ``times`` requests for ``path`` (``*``: any) go wrong; faults of one path come one after the other."""
        self._faults.setdefault(path, []).append(Fault(kind, times, **options))

    def count(self, path: str) -> int:
        """Requests for a path."""
        return sum(asked == path for _, asked, _ in self.requests)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take_fault(self, path: str) -> Fault | None:
        """The fault of this request, which is used up."""
        with self._lock:
            for key in (path, "*"):
                for fault in self._faults.get(key, []):
                    if fault.times is None:
                        return fault
                    if fault.times:
                        fault.times -= 1
                        return fault
        return None

    def note(self, request: tuple[str, str, str | None], headers: dict[str, str]) -> None:
        """Record a request."""
        with self._lock:
            self.requests.append(request)
            self.headers = headers

    def sent(self, count: int) -> None:
        """Record bytes of a body."""
        with self._lock:
            self.bytes_sent += count


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what the tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: Server

    def setup(self) -> None:
        super().setup()
        self.owner.connections += 1

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        asked = self.headers.get("Range")
        self.owner.note((self.command, path, asked), dict(self.headers))
        fault = self.owner.take_fault(path)
        kind = fault.kind if fault else None
        if kind == "hang":
            self.owner.stopping.wait()
            self.close_connection = True
            return
        if fault and kind == "status":
            return self._answer(fault.status, b"no", fault.headers)
        file = self.owner.directory / path
        if not file.is_file():
            return self._answer(404, b"no such file", {})
        self._answer_range(file, None if kind in ("no_ranges", "no_length") else asked, fault)

    def _answer_range(self, file: Path, asked: str | None, fault: Fault | None) -> None:
        kind, size = fault.kind if fault else None, file.stat().st_size
        headers = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        first, last = (int(found[1]), min(int(found[2] or size), size - 1)) if found else (0, size - 1)
        if found and first >= size:
            return self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
        if kind == "long":
            last += 10
        if kind == "other_range":
            first, last = first + 1, last + 1
        with file.open("rb") as handle:
            handle.seek(first)
            body = handle.read(last + 1 - first).ljust(last + 1 - first, b"-")
        if kind == "wrong":
            body = bytes(byte ^ 0xFF for byte in body)
        if found:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._answer(206 if found else 200, body, headers, fault)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
        kind = fault.kind if fault else None
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if kind == "no_length":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2 if fault is None or fault.after is None else fault.after
        try:
            if kind in ("reset", "short"):
                self._write(body[:half])
                self._break(reset=kind == "reset")
            elif kind == "trickle":
                for i in range(len(body)):
                    self._write(body[i : i + 1])
                    if self.owner.stopping.wait(0.01):
                        break
            elif kind == "no_length":
                self._write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            else:
                self._write(body)
        except OSError:  # the client has enough
            self.close_connection = True

    def _write(self, data: bytes) -> None:
        # In parts, so that what a client does not take is not counted.
        for start in range(0, len(data), 65536):
            part = data[start : start + 65536]
            self.owner.sent(len(part))
            self.wfile.write(part)

    def _break(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
