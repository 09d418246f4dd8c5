"""What Ray Serve's own proxy lets in, on a real local Serve."""

import asyncio
import socket
import time

import httpx
import pytest
import ray
from ray import serve
from starlette.requests import Request

from cluster.local import PROXY
from deployments.proxy import StripHeaders, http_host, middlewares
from tests.fakes import note


class Service:
    """Tells the headers that reach it and the address it is asked at; under /endless it waits until it is stopped."""

    def __init__(self, folder):
        self.folder = folder
        self.host = http_host()

    async def __call__(self, request: Request):
        if request.url.path == "/endless":
            note(self.folder, "began")
            try:
                await asyncio.Event().wait()
            finally:
                note(self.folder, "stopped")
        return {"headers": dict(request.headers), "host": self.host, "model": serve.get_multiplexed_model_id()}


def test_without_serve_nobody_listens():
    """In Serve's local testing mode http_host() is this machine, and starts no Ray."""
    assert http_host() == "127.0.0.1"
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def stripping():
    """The environment that cluster/local.py and the images set, before Ray starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PROXY.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def url(stripping, ray_here, folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "localhost", "port": port})
    serve.run(serve.deployment(Service, ray_actor_options={"num_cpus": 0.2}).bind(folder))
    return f"http://localhost:{port}"


@pytest.fixture
def get(url):
    return lambda **headers: httpx.get(
        url, headers={name.replace("_", "-"): value for name, value in headers.items()}, trust_env=False, timeout=30
    )


@pytest.mark.cluster
def test_a_client_cannot_shorten_the_servers_time(get):
    """x-request-timeout-seconds is not obeyed, and does not reach the service."""
    response = get(x_request_timeout_seconds="0.000001", x_other="1")
    assert response.status_code == 200
    assert "x-request-timeout-seconds" not in response.json()["headers"]
    assert response.json()["headers"]["x-other"] == "1"


@pytest.mark.cluster
def test_a_client_cannot_keep_work_running(url, folder):
    """With x-request-disconnect-disabled too, the work ends when the caller goes away."""

    async def go():
        async def until(name):
            deadline = time.monotonic() + 20
            while not (folder / name).exists():
                assert time.monotonic() < deadline, f"it never {name}"
                await asyncio.sleep(0.02)

        headers = {"x-request-disconnect-disabled": "?1"}
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
            request = asyncio.ensure_future(client.get("/endless", headers=headers))
            await until("began")
            request.cancel()
        await until("stopped")

    asyncio.run(go())


@pytest.mark.cluster
def test_a_client_names_neither_model_nor_request(url, get):
    """The model id is empty whatever header asks for one, and the id of the request is the service's own."""
    headers = {"serve_multiplexed_model_id": "../x", "Serve-Multiplexed-Model-Id": "../x", "x-request-id": "mine"}
    response = httpx.get(url, headers=headers, trust_env=False, timeout=30)
    assert response.json()["model"] == ""
    assert "mine" not in (response.json()["headers"]["x-request-id"], response.headers["x-request-id"])
    assert response.headers["x-request-id"] == response.json()["headers"]["x-request-id"]
    assert get().headers["x-request-id"] != response.headers["x-request-id"]


@pytest.mark.cluster
def test_a_replica_knows_where_serve_listens(get):
    """http_host() is the host of Serve's HTTP options, asked in the constructor of a replica."""
    assert get().json()["host"] == "localhost"


def test_every_way_of_writing_a_header_is_stripped():
    """Small or capital letters, - or _, once or twice; what is not Serve's stays, in its order."""
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["headers"])

    sent = [(b"a", b"1"), (b"X-Request-Id", b"2"), (b"x_request_id", b"3"), (b"x-request-id", b"4"), (b"a", b"5")]
    scope = {"type": "http", "headers": sent}
    asyncio.run(StripHeaders(app)(scope, None, None))
    assert seen == [[(b"a", b"1"), (b"a", b"5")]]
    assert scope["headers"] is sent
    assert [one.cls for one in middlewares()] == [StripHeaders]
