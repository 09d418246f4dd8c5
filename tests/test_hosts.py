"""For which names a service without API keys answers, and to which pages of a browser."""

import asyncio
import json

import httpx
import pytest
from starlette.types import Scope

from deployments.api import create_api
from deployments.hosts import OwnHost
from deployments.keys import as_problem, fingerprint
from pipeline.settings import KeySettings, Settings
from tests.loopback import HERE
from tests.service import InProcess

KEY = "pulid_of-tests-only"
OURS = ["127.0.0.1", "127.0.0.1:8000", "127.8.9.1:1", "localhost", "LOCALHOST:8000", "[::1]", "[::1]:8000"]
OTHERS = [
    *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "evil.localhost"),
    *(
        "10.0.0.1",
        "0.0.0.0",
        "[::]",
        "[fe80::1]",
        "::1",
        "user@127.0.0.1",
        "127.0.0.1/",
        "127.0.0.1:80:80",
        "2130706433",
    ),
    *("127.1", "127.0.0.1:x", "", " ", "127.0.0.1, evil.example", "\xe9"),
]


def get(app, headers, path="/v1/models", method="GET"):
    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE) as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(go())


@pytest.fixture
def app(tmp_path):
    settings = Settings(weights_dir=tmp_path)
    return create_api(InProcess(settings), settings)


def assert_refused(answer):
    assert (answer.status_code, answer.json()["code"]) == (403, "host_refused")


@pytest.mark.parametrize("host", OURS)
def test_programs_of_this_machine_are_answered(app, host):
    """By every name that is this machine's own, with any port, also from a page of its own."""
    assert get(app, {"host": host}).status_code == 200
    assert get(app, {"host": host, "origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize("host", OTHERS)
def test_other_names_are_refused(app, host):
    """A name that somebody has turned to 127.0.0.1 reaches nothing but the health."""
    latin = host.encode("latin-1")
    for path in ("/v1/models", "/docs", "/openapi.json", "/problems/no_face"):
        assert_refused(get(app, {"host": latin}, path))
    assert get(app, {"host": latin}, "/healthz").status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["null", "", "127.0.0.1", "file://", "ftp://localhost", "https://", *(f"http://{host}" for host in OTHERS)],
)
def test_pages_of_other_hosts_are_refused(app, origin):
    """A form or script of theirs may send requests here, and makes nothing happen."""
    for method in ("GET", "POST", "DELETE"):
        assert_refused(get(app, {"origin": origin.encode("latin-1")}, f"/v1/images/{'0' * 32}", method))


def test_each_api_refuses_in_its_own_words(app):
    """OpenAI's SDK knows a 403 as its own kind of error."""
    answer = get(app, {"host": "evil.example"}, "/v1/images/generations", "POST")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_refused")


def test_with_keys_a_service_has_any_name(tmp_path):
    """Who has to show a key is known by that alone; a browser shows nobody's."""
    (tmp_path / "keys.json").write_text(json.dumps([{"tenant": "acme", "sha256": fingerprint(KEY)}]))
    settings = Settings(weights_dir=tmp_path, keys=KeySettings(file=tmp_path / "keys.json"))
    headers = {"host": "pulid.example", "origin": "https://other.example", "authorization": f"Bearer {KEY}"}
    assert get(create_api(InProcess(settings), settings), headers).status_code == 200


@pytest.mark.parametrize("headers", [[], [(b"host", b"localhost")] * 2, [(b"host", b"evil.example")]])
def test_one_host_is_named(headers):
    """None or two of them are refused, also where a socket is to be opened."""
    sent = []

    async def go(kind):
        async def app(scope: Scope, receive, send):
            raise AssertionError("it was let in")

        async def send(message):
            sent.append(message)

        scope = {"type": kind, "path": "/v1/models", "headers": headers}
        await OwnHost(app, refusal=as_problem)(scope, None, send)

    for kind in ("http", "websocket"):
        asyncio.run(go(kind))
    assert (sent[0]["status"], sent[-1]) == (403, {"type": "websocket.close", "code": 1008})
