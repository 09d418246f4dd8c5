"""Real servers of plain HTTP on this machine: an application, one that answers by a script, and a bad connection."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import uvicorn

HERE = "http://127.0.0.1"  # by which an application is called that has no port; other names it may refuse
DROP = None  # in the place of an answer: the connection is closed without one


@contextmanager
def serving(app) -> Iterator[str]:
    """An ASGI application with its lifespan, on a port of this machine; its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # who comes before it has started waits
        config = uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@dataclass
class Script:
    """What a server answers, one after the other, and what it was asked: (method, path), headers, body."""

    answers: list[tuple[int, dict[str, str], bytes] | None]
    url: str = ""
    asked: list[tuple[tuple[str, str], dict[str, str], bytes]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        script = self.server.script
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        script.asked.append(((self.command, self.path), headers, body))
        answer = script.answers.pop(0)
        self.close_connection = True
        if answer is not DROP:
            status, headers, body = answer
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    do_POST = do_DELETE = do_GET

    def log_message(self, *_):
        """Tests read `asked` instead."""


@contextmanager
def scripted(*answers) -> Iterator[Script]:
    """A server that gives these answers: status, headers and body, or DROP."""
    script = Script(list(answers))
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.script = script
        script.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()


class Wire:
    """A way to a server that is cut: after a request with `mark` in it, so many bytes of the answer come through.

    It is cut once for each of `cuts`, and then no more.
    """

    def __init__(self, target: str, cuts: list[int], mark: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._target, self._mark = urlsplit(target), mark
        self._open, self._threads = [self._listener], []
        self.url, self.cuts = f"http://127.0.0.1:{self._listener.getsockname()[1]}", list(cuts)
        self._start(self._accept)

    def close(self) -> None:
        for connection in self._open:
            _shut(connection)
        for thread in self._threads:
            thread.join()
        for connection in self._open:
            connection.close()

    def _start(self, work, *arguments) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):  # it is shut
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._target.hostname, self._target.port))
                self._open += [client, server]
                left = []  # bytes that still come through, once the mark was seen
                self._start(self._forth, client, server, left)
                self._start(self._back, client, server, left)

    def _forth(self, client: socket.socket, server: socket.socket, left: list[int]) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if self._mark in data and self.cuts:
                    left.append(self.cuts.pop(0))
                server.sendall(data)
        _shut(server)

    def _back(self, client: socket.socket, server: socket.socket, left: list[int]) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if left:
                    data = data[: left[0]]
                    left[0] -= len(data)
                client.sendall(data)
                if left == [0]:
                    break
        _shut(client)
        _shut(server)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # the other end was quicker
        connection.shutdown(socket.SHUT_RDWR)
