"""S3 for tests, over HTTP on this machine: moto's server, and a proxy in front of it that fails on purpose.

    with s3_server() as endpoint:                 # http://127.0.0.1:PORT, with the bucket `pictures` in it
        with failing(endpoint, slow_down) as faulty:   # the first call meets a 503, the others pass
            store = open_store(s3_settings(faulty))

CREDENTIALS are for the environment of whoever talks to it (monkeypatch.setenv, or a Ray runtime_env).
"""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import boto3
import httpx
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from pipeline.settings import StoreSettings

BUCKET = "pictures"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "a-secret-that-must-never-be-seen",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",  # never look for a role of this machine
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}


def s3_settings(endpoint: str, **changes: Any) -> StoreSettings:
    """Settings of a store in BUCKET, impatient enough for tests."""
    values = {"url": f"s3://{BUCKET}/some/prefix", "endpoint_url": endpoint, "attempts": 2, "read_seconds": 5.0}
    return StoreSettings(**{**values, **changes})


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's server on a free port, empty but for BUCKET; gives its address."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    try:
        httpx.post(f"{endpoint}/moto-api/reset").raise_for_status()  # its world is one per process
        httpx.put(f"{endpoint}/{BUCKET}").raise_for_status()
        yield endpoint
    finally:
        server.stop()
        server._server.server_close()  # stop() leaves the socket open


@contextmanager
def access_checked(endpoint: str) -> Iterator[None]:
    """moto looks at credentials and their rights while this lasts."""
    httpx.post(f"{endpoint}/moto-api/reset-auth", content="0").raise_for_status()
    try:
        yield
    finally:
        httpx.post(f"{endpoint}/moto-api/reset-auth", content="inf").raise_for_status()


def user_without_rights(endpoint: str) -> dict[str, str]:
    """Credentials that moto knows, of a user who may do nothing."""
    session = boto3.session.Session(CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"])
    iam = session.client("iam", endpoint_url=endpoint, region_name="us-east-1")
    iam.create_user(UserName="nobody")
    key = iam.create_access_key(UserName="nobody")["AccessKey"]
    iam.close()
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


@dataclass
class Call:
    """One call to the proxy, and the ways to answer it."""

    handler: "_Handler"
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def upstream(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of what the real server answers."""
        address = urlsplit(self.handler.server.upstream)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
        try:
            connection.request(self.method, self.path, self.body, self.headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Send exactly this."""
        self.handler.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.handler.send_header(name, value)
        if "content-length" not in {name.lower() for name in headers}:
            self.handler.send_header("Content-Length", str(len(body)))
        self.handler.send_header("Connection", "close")  # a thread of the proxy lives for one call
        self.handler.end_headers()
        if self.method != "HEAD":
            self.handler.wfile.write(body)


Fault = Callable[[Call], None]


def passes(call: Call) -> None:
    """No fault: the real server answers."""
    call.answer(*call.upstream())


def without(*names: str) -> Fault:
    """A server that knows nothing of these headers."""

    def fault(call: Call) -> None:
        known = {name: value for name, value in call.headers.items() if name.lower() not in map(str.lower, names)}
        passes(replace(call, headers=known))

    return fault


def refuses(status: int, code: str) -> Fault:
    """An error answer as S3 writes it."""

    def fault(call: Call) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
        call.answer(status, {"Content-Type": "application/xml"}, body)

    return fault


slow_down = refuses(503, "SlowDown")


def stalls(call: Call) -> None:
    """The call arrives, and no answer comes while the proxy runs."""
    call.handler.server.closing.wait()


def hangs_up(call: Call) -> None:
    """The connection breaks before anything is carried out, as when the server goes down."""


def loses_the_answer(call: Call) -> None:
    """The call is carried out, and the connection breaks before its answer."""
    call.upstream()


def cuts_the_answer(call: Call) -> None:
    """Half of the answer's body arrives."""
    status, headers, body = call.upstream()
    call.answer(status, headers, body[: len(body) // 2])


def damages_the_answer(call: Call) -> None:
    """One byte of the answer's body is another."""
    status, headers, body = call.upstream()
    call.answer(status, headers, bytes([body[0] ^ 1]) + body[1:])


def stores_other_bytes(call: Call) -> None:
    """The server reports the checksum of something else."""
    status, headers, body = call.upstream()
    call.answer(status, {**headers, "x-amz-checksum-sha256": "A" * 43 + "="}, body)


def one_at_a_time() -> Fault:
    """S3 decides conditional writes of one key one after the other; moto's threads alone do not."""
    lock = threading.Lock()

    def fault(call: Call) -> None:
        with lock:
            answer = call.upstream()
        call.answer(*answer)

    return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        call = Call(self, self.command, self.path, headers, body)
        self.close_connection = True
        with suppress(ConnectionError):  # the caller may have given up
            self.server.next_fault(call)(call)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle


class _Proxy(ThreadingHTTPServer):
    daemon_threads = False  # server_close waits for every answer

    def __init__(self, upstream: str, faults: tuple[Fault, ...], otherwise: Fault) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.closing = threading.Event()
        self.calls: list[tuple[str, str]] = []
        self.faults = list(faults)
        self.otherwise = otherwise
        self._lock = threading.Lock()

    def next_fault(self, call: Call) -> Fault:
        with self._lock:
            self.calls.append((call.method, call.path))
            return self.faults.pop(0) if self.faults else self.otherwise


@dataclass
class Faulty:
    """A running proxy: its address, the calls that it saw, as (method, path), and the faults to come."""

    endpoint: str
    calls: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


@contextmanager
def failing(upstream: str, *faults: Fault, otherwise: Fault = passes) -> Iterator[Faulty]:
    """A proxy in front of `upstream`: call n meets fault n, and calls beyond the last fault meet `otherwise`."""
    proxy = _Proxy(upstream, faults, otherwise)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Faulty(f"http://127.0.0.1:{proxy.server_port}", proxy.calls, proxy.faults)
    finally:
        proxy.closing.set()
        proxy.shutdown()
        proxy.server_close()
        thread.join()
