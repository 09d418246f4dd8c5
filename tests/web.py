"""A small https server for tests, on this machine, that answers with exactly the bytes it is told to.

with web_server({"/a.png": ok(PNG)}) as web:
    Fetcher(Settings(), web.network()).fetch("https://photos.example/a.png")
"""

import datetime
import functools
import re
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.network import Network, is_public

HOST = "photos.example"
Answer = bytes | Callable[[socket.socket, threading.Event], None]


def ok(body: bytes, *headers: str) -> bytes:
    """A whole, honest answer."""
    return head("200 OK", f"Content-Length: {len(body)}", *headers) + body


def head(status: str, *headers: str) -> bytes:
    """The beginning of an answer, up to its body."""
    return "\r\n".join((f"HTTP/1.1 {status}", *headers, "", "")).encode()


def redirect(location: str) -> bytes:
    """An answer that sends the caller on, and tries to set a cookie."""
    return head("302 Found", f"Location: {location}", "Content-Length: 0", "Set-Cookie: seen=1")


def pour(connection: socket.socket, closing: threading.Event) -> None:
    """Answers without an end."""
    connection.sendall(head("200 OK", "Transfer-Encoding: chunked"))
    while not closing.is_set():
        connection.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")


def drip(start: bytes) -> Answer:
    """Answers with `start`, then byte by byte, slowly and without an end."""

    def answer(connection: socket.socket, closing: threading.Event) -> None:
        connection.sendall(start)
        while not closing.wait(0.02):
            connection.sendall(b"x")

    return answer


@functools.cache
def certificate() -> tuple[bytes, bytes]:
    """A certificate for HOST and *.HOST that signs itself, and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST), x509.DNSName(f"*.{HOST}")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return made.public_bytes(serialization.Encoding.PEM), secret


@dataclass
class Web:
    """A running server, what it was asked, and what it saw of TLS."""

    port: int
    requests: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)  # of each request
    names: list[str | None] = field(default_factory=list)  # the server names that clients asked for
    resolved: list[str] = field(default_factory=list)

    def network(self, **addresses: Sequence[str]) -> Network:
        """A network that finds every host here, but for those whose addresses are given (a_b means a.b).

        It allows this machine's address 127.0.0.1 besides the public ones, and trusts the server's certificate.
        """
        known = {host.replace("_", "."): found for host, found in addresses.items()}

        def resolve(host: str) -> Sequence[str]:
            self.resolved.append(host)
            return known.get(host, ["127.0.0.1"])

        return Network(
            resolve=resolve,
            allows=lambda address: is_public(address) or str(address) == "127.0.0.1",
            tls=ssl.create_default_context(cadata=certificate()[0].decode()),
            port=self.port,
        )


@contextmanager
def web_server(answers: dict[str, Answer]) -> Iterator[Web]:
    """Answers each path with bytes, or lets a function write what it likes until the event says to stop."""
    listener = socket.create_server(("127.0.0.1", 0))
    web, closing, threads = Web(listener.getsockname()[1]), threading.Event(), []
    tls = _server_tls(web)

    def serve(connection: socket.socket) -> None:
        # a client may break off at any moment: that is what is tested
        with connection, suppress(OSError), tls.wrap_socket(connection, server_side=True) as secure:
            secure.settimeout(10)
            while request := _head(secure):
                web.bodies.append(_body(secure, request))
                web.requests.append(request)
                answer = answers.get(request.split(" ")[1], head("404 Not Found", "Content-Length: 0"))
                if callable(answer):
                    answer(secure, closing)
                    return
                secure.sendall(answer)

    def accept() -> None:
        with suppress(OSError):  # the listener is shut down
            while True:
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=serve, args=(connection,)))
                threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield web
    finally:
        closing.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (acceptor, *threads):
            thread.join()


def _head(connection: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\r\n\r\n"):  # byte by byte, as a body may follow
        piece = connection.recv(1)
        if not piece:
            return ""
        data += piece
    return data.decode()


def _body(connection: socket.socket, request: str) -> bytes:
    found = re.search(r"^content-length: (\d+)\r$", request, re.IGNORECASE | re.MULTILINE)
    data, size = b"", int(found[1]) if found else 0
    while len(data) < size and (piece := connection.recv(size - len(data))):
        data += piece
    return data


def _server_tls(web: Web) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "both.pem"
        path.write_bytes(b"".join(certificate()))
        context.load_cert_chain(path)
    context.sni_callback = lambda _socket, name, _context: web.names.append(name)
    return context
