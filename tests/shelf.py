"""A real server of model files for tests: with and without ranges, ETags, cut connections and refusals."""

import contextlib
import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Shelf:
    """What the server has and how it behaves; `asked` and `sent` are what it saw."""

    files: dict[str, bytes] = field(default_factory=dict)  # path -> bytes
    ranges: bool = True
    etag: str | None = '"one"'
    etag_changes: bool = False  # the file is another one at every request
    linked: dict[str, str] = field(default_factory=dict)  # path -> what the hub says its sha256 is
    status: dict[str, int] = field(default_factory=dict)  # path -> refuse with this status
    redirect: dict[str, str] = field(default_factory=dict)  # path -> another address
    cut: list[int] = field(default_factory=list)  # one entry per answer: close the connection after so many bytes
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    """Answers from server.shelf."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        shelf = self.server.shelf
        shelf.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        if self.path in shelf.redirect:
            return self.answer(302, {"Location": shelf.redirect[self.path]})
        if self.path in shelf.status:
            return self.answer(shelf.status[self.path])
        if self.path not in shelf.files:
            return self.answer(404)
        return self.send(shelf.files[self.path])

    def send(self, data):
        shelf = self.server.shelf
        etag = f'"{len(shelf.asked)}"' if shelf.etag_changes else shelf.etag
        headers = {"ETag": etag} if etag else {}
        if self.path in shelf.linked:
            headers["X-Linked-Etag"] = f'"{shelf.linked[self.path]}"'
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if not start or not shelf.ranges or self.headers.get("If-Range", etag) != etag:
            return self.answer(200, headers, data)
        if start >= len(data):
            return self.answer(416, {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(206, headers, data[start:])

    def answer(self, status, headers=None, data=b""):
        shelf = self.server.shelf
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if data and shelf.cut:
            data = data[: shelf.cut.pop(0)]
            self.close_connection = True
        shelf.sent += len(data)
        self.wfile.write(data)

    def log_message(self, *arguments):
        """Keep the tests' output clean."""


@contextlib.contextmanager
def serve(shelf: Shelf):
    """Serve the shelf on this machine; its address is shelf.url."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.shelf = shelf
    server.daemon_threads = True
    shelf.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield shelf
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
