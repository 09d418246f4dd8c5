"""How many callers one replica lets wait: streams of events, and requests that are held until a job ends."""

import asyncio
import json
from contextlib import ExitStack

import httpx
import pytest

from deployments.admission import WAITING, Admission
from deployments.api import create_api
from deployments.keys import Caller, fingerprint
from deployments.limits import WAITS, Limits
from pipeline.errors import Overloaded, RateLimited
from pipeline.settings import JobSettings, KeySettings, LimitSettings, Settings
from tests.loopback import serving
from tests.service import InProcess

KEYS = {"acme": "pulid_of-tests-only", "other": "pulid_another-of-tests-only"}
BODY = {"prompt": "portrait", "width": 256, "height": 256, "num_steps": 2}
MOST = 2 * WAITS // WAITING + 1  # requests in the making, of which half the waits are more than every tenant's


class Endless(InProcess):
    """Begins pictures and finishes none."""

    async def make(self, request, tenant, expires, progress=None):
        await asyncio.Event().wait()


@pytest.fixture
def settings(tmp_path):
    entries = [{"tenant": tenant, "sha256": fingerprint(key), "max_jobs": 3} for tenant, key in KEYS.items()]
    (tmp_path / "keys.json").write_text(json.dumps(entries))
    return Settings(
        weights_dir=tmp_path,
        keys=KeySettings(file=tmp_path / "keys.json"),
        limits=LimitSettings(max_requests=MOST, request_seconds=0.5),
        jobs=JobSettings(scan_seconds=0.05),
    )


@pytest.fixture
def connect(settings):
    """Makes a client of a service that ends no job, with the key of a tenant."""
    service = Endless(settings)
    with serving(create_api(service, settings, service.life)) as url, ExitStack() as open_clients:

        def connect(tenant="acme"):
            headers = {"authorization": f"Bearer {KEYS[tenant]}"}
            return open_clients.enter_context(httpx.Client(base_url=url, headers=headers, timeout=30))

        yield connect


def waiting(admission, caller, most=100):
    """How many places for waiting a caller gets."""
    with ExitStack() as places:
        for count in range(most):
            try:
                places.enter_context(admission.waiting(caller))
            except (Overloaded, RateLimited):
                return count
        return most


@pytest.mark.parametrize(
    ("caller", "places"),
    [
        (Caller(), 80),
        (Caller("acme", "k"), 40),
        (Caller("acme", "k", max_jobs=1), WAITS),
        (Caller("acme", "k", max_jobs=12), 12),
        (Caller("acme", "k", max_jobs=1000), 40),
    ],
)
def test_a_tenant_leaves_places_to_others(caller, places):
    """As many wait as a key may have jobs, at least eight, at most half of all; places that end are free again."""
    admission = Admission(20, Limits(), lambda _: 0)
    assert [waiting(admission, caller) for _ in range(2)] == [places, places]
    with ExitStack() as taken:
        for _ in range(places):
            taken.enter_context(admission.waiting(caller))
        assert waiting(admission, Caller("other", "l")) == min(40, 80 - places)


def test_what_waits_is_bounded_before_it_begins(connect):
    """Beyond the places of a key a stream, Replicate's and a held request are 429; nothing is made of them."""
    client, other = connect(), connect("other")
    job = client.post("/v1/images", json=BODY, headers={"Prefer": "respond-async"}).json()
    stream = f"/v1/predictions/{job['id']}/stream"
    with ExitStack() as streams:
        for number in range(WAITS):
            path = (job["events"], stream)[number % 2]
            assert streams.enter_context(client.stream("GET", path)).status_code == 200
        held = {"Prefer": "wait=20"}
        refused = [
            client.get(job["events"]),
            client.get(stream),
            client.post("/v1/images", json=BODY, headers=held),
            client.post("/v1/images", json=BODY, headers={"Idempotency-Key": "1"}),
            client.post("/v1/predictions", json={"version": "a/flux-pulid", "input": BODY}, headers=held),
        ]
        assert [(answer.status_code, answer.json()["code"]) for answer in refused] == [(429, "rate_limited")] * 5
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert client.get(job["record"]).status_code == 200
        assert other.get(job["events"]).status_code == 404
        # of three jobs that the key may have, one is open, and none came of what was refused
        more = [client.post("/v1/images", json=BODY, headers={"Prefer": "respond-async"}) for _ in range(3)]
        assert [answer.status_code for answer in more] == [202, 202, 429]
    client.post(job["cancel"])
    answers = (client.get(job["events"]) for _ in range(1000))  # until the service has seen them leave
    assert "event: cancelled" in next(answer for answer in answers if answer.status_code == 200).text


def test_who_has_a_webhook_alone_is_led_to_the_job(connect):
    """A request that waits and is not done in time goes on: 202 says where, as there is no key to ask again with."""
    client, hook = connect(), {"webhook": "https://hooks.example/1"}
    answer = client.post("/v1/images", json={**BODY, **hook})
    assert (answer.status_code, answer.headers["location"]) == (202, answer.json()["record"])
    assert "preference-applied" not in answer.headers
    assert client.get(answer.headers["location"]).json()["status"] in ("queued", "running")
    keyed = client.post("/v1/images", json={**BODY, **hook}, headers={"Idempotency-Key": "1"})
    assert (keyed.status_code, keyed.json()["code"]) == (504, "deadline_exceeded")
