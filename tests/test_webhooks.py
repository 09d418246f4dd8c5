"""What a stranger's webhook address may make this service do, and how a receiver knows whom a webhook is from."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from pydantic import ValidationError
from replicate.webhook import InvalidSignatureError, InvalidTimestampError, WebhookSigningSecret
from replicate.webhook import Webhooks as Receiver

from pipeline.errors import SettingsInvalid, WebhookRefused
from pipeline.network import Network
from pipeline.request import Request
from pipeline.settings import Settings, WebhookSettings
from pipeline.webhooks import Webhooks, read_secret, sign, tenant_secret
from tests.service import InProcess
from tests.test_fetch import NOT_PUBLIC, ODD_ADDRESSES, TLS
from tests.web import HOST, drip, head, ok, pour, redirect, web_server

ROOT = Path(__file__).parent.parent
SECRET = b"of this service, long enough"
FOLDER = TemporaryDirectory(prefix="pulid-")
SECRET_FILE = Path(FOLDER.name, "secret")
SECRET_FILE.write_bytes(SECRET + b"\n")
URL = f"https://{HOST}/hook?token=abc"
PATH = "/hook?token=abc"
BODY = json.dumps({"status": "succeeded", "name": "Zoë"}).encode()
SETTINGS = WebhookSettings(secret_file=SECRET_FILE, seconds=1.0)


def deliver(web, url=URL, tenant="acme", now=None, settings=SETTINGS, hosts=None):
    clock = {} if now is None else {"now": lambda: now}
    return Webhooks(settings, web.network(**hosts or {}), **clock).deliver(url, "msg-1", BODY, tenant)


def headers(web):
    lines = [line.split(": ", 1) for line in web.requests[-1].split("\r\n")[1:] if line]
    return {name.lower(): value for name, value in lines}


def accept(web, tenant="acme", body=BODY, tolerance=None):
    """What the receiver's own library says of the last request."""
    secret = WebhookSigningSecret(key=tenant_secret(SECRET, tenant))
    Receiver.validate(headers=headers(web), body=body.decode(), secret=secret, tolerance=tolerance)


def test_the_bytes_of_a_signature():
    """The HMAC-SHA256 of id, timestamp and body with dots between, by a key that decodes from whsec_ and base64."""
    secret = tenant_secret(SECRET, "acme")
    key = base64.b64decode(secret.removeprefix("whsec_"))
    wanted = hmac.new(key, b"msg-1.1700000000." + BODY, hashlib.sha256).digest()
    assert sign(key, "msg-1", 1_700_000_000, BODY) == f"v1,{base64.b64encode(wanted).decode()}"
    assert secret.startswith("whsec_")
    assert len(key) == 32
    # the example of the Standard Webhooks' specification
    spec = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = sign(spec, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_receiver_can_tell_that_it_is_ours():
    """Replicate's own validator accepts what arrives, for that tenant, that body and those minutes alone."""
    with web_server({PATH: ok(b"")}) as web:
        assert deliver(web) is True
        assert web.bodies == [BODY]
        assert web.requests[0].startswith(f"POST {PATH} HTTP/1.1\r\n")
        assert headers(web)["content-type"] == "application/json"
        accept(web, tolerance=300)
        for wrong in ({"tenant": "other"}, {"tenant": ""}, {"body": BODY + b" "}):
            with pytest.raises(InvalidSignatureError):
                accept(web, **wrong)


def test_the_documentation_checks_a_signature():
    """The ten lines of docs/api.md accept what is sent, and neither another body, another key nor an old one."""
    code = re.search(r"```python\n(import base64, hmac.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    is_genuine, secret = names["is_genuine"], tenant_secret(SECRET, "acme")
    with web_server({PATH: ok(b"")}) as web:
        deliver(web)
        sent = headers(web)
        assert is_genuine(secret, sent, BODY)
        assert is_genuine(secret, {**sent, "webhook-signature": f"v1,AAAA {sent['webhook-signature']}"}, BODY)
        assert not is_genuine(secret, sent, BODY + b" ")
        assert not is_genuine(tenant_secret(SECRET, ""), sent, BODY)
        assert not is_genuine(secret, {**sent, "webhook-id": "msg-2"}, BODY)
        deliver(web, now=1_700_000_000)
        assert not is_genuine(secret, headers(web), BODY)


def test_an_old_webhook_cannot_be_played_again():
    """Every try has a timestamp of its own under one id, and one of an hour ago is refused by the receiver."""
    with web_server({PATH: ok(b"")}) as web:
        deliver(web, now=1_700_000_000.9)
        first = headers(web)
        accept(web)
        with pytest.raises(InvalidTimestampError):
            accept(web, tolerance=300)
        deliver(web)
        accept(web, tolerance=300)
        assert headers(web)["webhook-id"] == first["webhook-id"]
        assert first["webhook-timestamp"] == "1700000000"


ANSWERS = [
    (head("204 No Content"), True, 204),
    (ok(b"x" * 10_000_000), True, 200),
    (pour, True, 200),
    (drip(head("200 OK", "Content-Length: 100000")), True, 200),
    (lambda connection, closing: connection.sendall(ok(BODY)[:-1]), True, 200),
    (head("410 Gone", "Content-Length: 0"), None, 410),
    (head("400 Bad Request", "Content-Length: 0"), False, 400),
    (head("404 Not Found", "Content-Length: 0"), False, 404),
    (head("429 Too Many Requests", "Content-Length: 0"), False, 429),
    (head("500 Oh", "Content-Length: 0"), False, 500),
    (head("503 Busy", "Content-Length: 0"), False, 503),
    (redirect(f"https://{HOST}/other"), False, 302),
    (head("307 Temporary Redirect", f"Location: https://{HOST}/other", "Content-Length: 0"), False, 307),
    (drip(b"HTTP/1.1 200 OK\r\nX-Slow: "), False, None),
    (drip(b""), False, None),
    (lambda connection, closing: closing.wait(10), False, None),
    (lambda connection, closing: None, False, None),
    (b"no HTTP at all\r\n\r\n", False, None),
    (head("200 OK", "X-Long: " + "x" * 300_000), False, None),
]


@pytest.mark.parametrize(("answer", "arrived", "status"), ANSWERS)
def test_what_an_answer_means(answer, arrived, status, caplog):
    """2xx is delivered whatever its body does, 410 is the end, all else is tried again; no redirect is followed."""
    with web_server({PATH: answer, "/other": ok(b"")}) as web:
        assert deliver(web) is arrived
        assert len(web.requests) == 1
    assert arrived or not status or caplog.messages[-1].endswith(f"answered with {status}")


def test_only_a_little_of_an_answer_is_read():
    """An endless answer is left after 64 KB, long before the time is over."""
    sent = []

    def endless(connection, closing):
        connection.sendall(head("200 OK", "Transfer-Encoding: chunked"))
        while not closing.is_set():
            connection.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
            sent.append(0x1000)

    with web_server({PATH: endless}) as web:
        assert deliver(web, settings=WebhookSettings(secret_file=SECRET_FILE, seconds=60)) is True
    assert sum(sent) < 10_000_000  # what sockets hold, and not a minute's worth


@pytest.mark.parametrize("address", [url for urls in ODD_ADDRESSES.values() for url in urls])
def test_odd_addresses_are_refused_with_the_request(address):
    """What is no plain https address of a public host is refused at once, and never sent to."""
    with web_server({}) as web:
        with pytest.raises(WebhookRefused):
            Webhooks(SETTINGS, web.network()).check(address)
        assert deliver(web, url=address) is None
        assert web.resolved == []


def test_a_plain_address_is_taken():
    """An ordinary address passes, with its query; no name is resolved for that."""
    with web_server({}) as web:
        Webhooks(SETTINGS, web.network()).check(URL)
        assert web.resolved == []


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_nothing_is_sent_inside(address):
    """A name of which one address is not public is given up; no connection is made to the others."""
    with web_server({PATH: ok(b"")}) as web:
        hosts = {HOST.replace(".", "_"): ["93.184.216.34", address]}
        webhooks = Webhooks(SETTINGS, Network(web.network(**hosts).resolve, tls=TLS))
        assert webhooks.deliver(URL, "msg-1", BODY, "acme") is None


def test_what_was_checked_is_what_is_connected_to():
    """A name that changes its address after the check (TTL 0) leads nowhere else."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    with web_server({PATH: ok(b"")}) as web:
        plain = web.network()
        network = Network(lambda host: next(answers), plain.allows, plain.tls, plain.port)
        assert Webhooks(SETTINGS, network).deliver(URL, "msg-1", BODY, "acme") is True
    assert len(list(answers)) == 1


def test_the_certificate_must_fit():
    """A webhook goes to nobody but the host that its address names."""
    with web_server({PATH: ok(b"")}) as web:
        plain = web.network()
        strangers = Network(plain.resolve, plain.allows, TLS, plain.port)
        assert deliver(web, url="https://other.example/hook") is False
        assert Webhooks(SETTINGS, strangers).deliver(URL, "msg-1", BODY, "acme") is False
        assert web.requests == []


def test_names_that_do_not_resolve_are_tried_again():
    """An unknown name, one without addresses and a resolver that takes for ever are no end: names come back."""
    waiting = threading.Event()

    def unknown(host):
        raise OSError("no such name")

    for resolve in (unknown, lambda host: [], lambda host: waiting.wait(5) or []):
        settings = WebhookSettings(secret_file=SECRET_FILE, seconds=0.2)
        assert Webhooks(settings, Network(resolve, tls=TLS)).deliver(URL, "msg-1", BODY, "acme") is False
    waiting.set()


def test_logs_name_the_host_alone(caplog):
    """The rest of an address may hold a secret, and a body what nobody else should read."""
    with caplog.at_level(logging.DEBUG), web_server({PATH: head("500 Oh", "Content-Length: 0")}) as web:
        deliver(web)
    ours = [record.getMessage() for record in caplog.records if record.name == "pipeline.webhooks"]
    assert ours == [f"webhook msg-1 to {HOST}: answered with 500"]


def test_without_a_secret_none_are_sent():
    """A service that cannot sign refuses webhooks, makes no secret for a tenant, and sends nothing."""
    with web_server({PATH: ok(b"")}) as web:
        silent = Webhooks(WebhookSettings(), web.network())
        with pytest.raises(WebhookRefused):
            silent.check(URL)
        assert silent.deliver(URL, "msg-1", BODY, "acme") is None
        assert web.resolved == []
    with pytest.raises(WebhookRefused):
        tenant_secret(b"", "acme")


@pytest.mark.parametrize("content", [b"", b"a short one", b" " * 60, b"x" * 5000, None])
def test_a_secret_is_long_and_shows_in_no_text(tmp_path, content):
    """Who knows a tenant's key must not be able to guess what it was made of; a bad file is told at the start."""
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    settings = Settings.from_environment({"PULID_WEBHOOKS__SECRET_FILE": str(tmp_path / "secret")}).webhooks
    with pytest.raises(SettingsInvalid, match=str(tmp_path)) as told:
        Webhooks(settings)
    assert not content or content.decode() not in str(told.value)


def test_each_tenant_has_a_key_of_its_own():
    """What one tenant knows says nothing of what another checks with; white space around the secret is none of it."""
    assert tenant_secret(SECRET, "a") != tenant_secret(SECRET, "b")
    assert read_secret(SETTINGS) == SECRET


def test_a_secret_that_changes_counts_at_once(tmp_path):
    """A delivery is signed with what the file has then; without a usable file it is kept for the next try."""
    file = tmp_path / "secret"
    file.write_bytes(b"another one, just as long as that")
    with web_server({PATH: ok(b"")}) as web:
        webhooks = Webhooks(WebhookSettings(secret_file=file, seconds=1.0), web.network())
        file.unlink()
        assert webhooks.deliver(URL, "msg-1", BODY, "acme") is False
        assert web.requests == []
        file.write_bytes(SECRET)
        assert webhooks.deliver(URL, "msg-1", BODY, "acme") is True
        accept(web)


def test_errors_quote_no_setting():
    """A value that is refused may be a secret that was put into the wrong place."""
    with pytest.raises(SettingsInvalid) as told:
        Settings.from_environment({"PULID_WEBHOOKS__SECRET": "hunter2 hunter2 hunter2 hunter2"})
    assert "hunter2" not in f"{told.value} {told.value.__cause__}"
    with pytest.raises(ValidationError) as told:
        WebhookSettings(seconds="hunter2")
    assert "hunter2" not in str(told.value)


def test_delays_grow_and_spread():
    """Tries become rarer up to a bound; two deliveries that failed together are not tried together again."""
    delay = Webhooks(SETTINGS, Network(tls=TLS)).retry_delay
    delays = [delay("msg-1", tries) for tries in range(1, 21)]
    assert all(10 * 6**n <= delays[n] <= 15 * 6**n for n in range(4))
    assert max(delays) <= 1.5 * 21_600
    assert delays == [delay("msg-1", tries) for tries in range(1, 21)]
    assert len({delay(f"msg-{n}", 1) for n in range(100)}) > 50


class Hasty(Webhooks):
    """Tries again at once."""

    def retry_delay(self, delivery_id, tries):
        return 0.0


def test_the_end_of_a_job_is_told_until_it_arrives(tmp_path):
    """A receiver that fails twice hears of the job by the third try: one id, each signed, and the pictures named."""
    tries = []

    def fails_twice(connection, closing):
        tries.append(1)
        connection.sendall(ok(b"") if len(tries) == 3 else head("500 Oh", "Content-Length: 0"))

    with web_server({PATH: fails_twice}) as web:
        service = InProcess(Settings(weights_dir=tmp_path), sender=Hasty(SETTINGS, web.network()))
        request = Request(prompt="portrait", width=256, height=256, num_steps=2, webhook=URL)

        async def go():
            async with service.life(), asyncio.timeout(30):
                job, _ = await service.jobs.submit(request, "acme", None)
                while len(tries) < 3 or service.store.read("acme", job["id"]) is not None:
                    await asyncio.sleep(0.01)
                return await service.jobs.view("acme", job["id"])

        view = asyncio.run(go())
        ids = {line for request in web.requests for line in request.split("\r\n") if line.startswith("webhook-id")}
        assert len(web.bodies) == 3
        assert len(ids) == 1
        accept(web, body=web.bodies[-1], tolerance=300)
        told = json.loads(web.bodies[-1])
        assert told["type"] == view["status"] == "succeeded"
        assert (told["data"]["id"], told["data"]["images"]) == (view["id"], view["images"])
