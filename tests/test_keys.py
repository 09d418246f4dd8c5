"""API keys: the file that operators make, the middleware that asks for one, and the commands."""

import asyncio
import hashlib
import json
import logging
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse
from typer.testing import CliRunner

from cluster.cli import app as pulid
from cluster.keys_cli import add
from deployments.keys import Authenticate, Caller, Entry, KeyFile, check_exposure, fingerprint, new_key, read_entries
from deployments.limits import Limits
from pipeline.errors import KeyInvalid, SettingsInvalid
from pipeline.settings import KeySettings, Settings, StoreSettings
from tests.loopback import HERE

KEY, OTHER = "pulid_of-tests-only", "pulid_another-of-tests-only"


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


def entry(tenant="acme", key=KEY, **more):
    return {"tenant": tenant, "sha256": hashlib.sha256(key.encode()).hexdigest(), **more}


@pytest.fixture
def path(tmp_path):
    """A key file with one key."""
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([entry(requests_per_minute=60, max_jobs=2)]))
    file.chmod(0o600)
    return file


async def service(scope, receive, send):
    """An ASGI application that answers with the caller whom it sees."""
    caller = scope.get("state", {}).get("caller")
    told = json.dumps([caller.tenant, caller.max_jobs] if caller else None).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": told})


def get(keys, *headers, path="/v1/images", spend=lambda caller: None, **options):
    """The answer of the service behind the middleware."""

    async def go():
        transport = httpx.ASGITransport(Authenticate(service, keys, spend, **options))
        async with httpx.AsyncClient(transport=transport, base_url=HERE) as client:
            return await client.get(path, headers=list(headers))

    return asyncio.run(go())


def bearer(key=KEY, scheme="Bearer"):
    return ("Authorization", f"{scheme} {key}")


# --- the middleware


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Token"])
def test_a_key_says_who_calls(path, scheme):
    """Routes see the tenant and limits of the key, in either scheme."""
    assert get(KeyFile(path), bearer(scheme=scheme)).json() == ["acme", 2]


REFUSED = {
    "none": (),
    "unknown": (bearer(OTHER),),
    "empty": (bearer(""),),
    "only a scheme": (("Authorization", "Bearer"),),
    "another scheme": (bearer(scheme="Basic"),),
    "no scheme": (("Authorization", KEY),),
    "two": (bearer(), bearer()),
    "long": (bearer(KEY + " " * 10 + "x" * 600),),
    "the hash itself": (bearer(fingerprint(KEY)),),
    "not ASCII": (("Authorization", "Bearer schlüssel".encode()),),
    "as a cookie": (("Cookie", f"key={KEY}"),),
}


@pytest.mark.parametrize("headers", REFUSED.values(), ids=REFUSED)
def test_without_a_known_key_nobody_comes_in(path, headers):
    """Every other way of asking is a 401 problem that says which scheme to use, and repeats nothing."""
    response = get(KeyFile(path), *headers)
    assert (response.status_code, response.headers["content-type"]) == (401, "application/problem+json")
    assert response.json()["code"] == "key_invalid"
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


def test_a_key_in_the_address_is_not_read(path):
    """An address gets into logs; a key in it opens nothing."""
    assert get(KeyFile(path), path=f"/v1/images?key={KEY}&access_token={KEY}").status_code == 401


@pytest.mark.parametrize("public", ["/healthz", "/docs", "/docs/x", "/openapi.json", "/problems/no_face"])
def test_what_needs_no_key(path, public):
    """Health, documentation and the meaning of errors are everybody's."""
    assert get(KeyFile(path), path=public).status_code == 200


@pytest.mark.parametrize("closed", ["/", "/v1", "/docsx", "/healthz/x", "/problems", "/v1/docs/", "//docs"])
def test_all_else_needs_one(path, closed):
    """A path that only looks like a public one, or that does not exist, is closed."""
    assert get(KeyFile(path), path=closed).status_code == 401


def test_below_a_prefix_the_same_is_public(path):
    """Where Serve mounts the application below a prefix, paths are read without it."""

    def status(address):
        async def go():
            scope = {"type": "http", "path": address, "root_path": "/faces", "headers": []}
            sent = []

            async def send(message):
                sent.append(message)

            await Authenticate(service, KeyFile(path), lambda caller: None)(scope, None, send)
            return sent[0]["status"]

        return asyncio.run(go())

    assert (status("/faces/healthz"), status("/faces/v1/models")) == (200, 401)


def test_without_a_key_file_everybody_is_nobody():
    """Every caller is tenant "" without limits, also with a key that nobody asked for."""
    assert get(None).json() == get(None, bearer()).json() == ["", None]


def test_a_websocket_is_refused(path):
    """There is none behind the middleware, and none that is added later is open by mistake."""
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Authenticate(service, KeyFile(path), lambda caller: None)({"type": "websocket"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_too_many_requests_are_told_when_to_come_back(path):
    """The request beyond a minute's worth is a 429 with the seconds until the next one is let in."""
    keys, limits = KeyFile(path), Limits(clock=Clock())
    answers = [get(keys, bearer(), spend=limits.spend) for _ in range(61)]
    assert [answer.status_code for answer in answers] == [200] * 60 + [429]
    assert (answers[-1].json()["code"], answers[-1].headers["retry-after"]) == ("rate_limited", "1")


def test_another_api_refuses_in_its_own_shape(path):
    """`refusal` makes the answer, for the routes of other APIs."""
    response = get(KeyFile(path), refusal=lambda scope, error: PlainTextResponse(scope["path"], error.status))
    assert (response.status_code, response.text) == (401, "/v1/images")


# --- the file


def test_keys_of_one_tenant_overlap(path):
    """While a key is replaced, the old one and the new one are the same tenant."""
    path.write_text(json.dumps([entry(), entry(key=OTHER)]))
    keys = KeyFile(path)
    assert [keys.caller(key.encode()).tenant for key in (KEY, OTHER)] == ["acme", "acme"]


def test_an_expired_key_opens_nothing(path):
    """To the second, in whatever zone the time is written."""
    path.write_text(json.dumps([entry(expires="2030-01-01T01:00:00+01:00")]))
    wall = Clock(1893455999.0)  # 2029-12-31T23:59:59Z
    keys = KeyFile(path, wall=wall)
    assert keys.caller(KEY.encode()).tenant == "acme"
    wall.now += 1
    with pytest.raises(KeyInvalid, match="expired"):
        keys.caller(KEY.encode())


def test_a_changed_file_is_seen(path, tmp_path):
    """Within a second of its change, also where a symlink is swapped for a file with the same size and times."""
    link, clock = tmp_path / "link", Clock()
    link.symlink_to(path)
    keys = KeyFile(link, clock=clock)
    later = tmp_path / "later.json"
    later.write_text(path.read_text().replace(fingerprint(KEY), fingerprint(OTHER)))
    os.utime(later, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    fresh = tmp_path / "fresh"
    fresh.symlink_to(later)
    fresh.replace(link)
    assert keys.caller(KEY.encode()).tenant == "acme"
    clock.now += 1
    assert keys.caller(OTHER.encode()).tenant == "acme"
    with pytest.raises(KeyInvalid):
        keys.caller(KEY.encode())


@pytest.mark.parametrize("broken", [None, "", "[", "{}", '[{"tenant": "acme"}]'])
def test_a_broken_file_changes_nothing_and_is_told_once(path, broken, caplog):
    """The keys from before stay in use; one line of the log says so, and after it is mended the file counts again."""
    clock = Clock()
    keys = KeyFile(path, clock=clock)
    path.unlink() if broken is None else path.write_text(broken)
    for _ in range(3):
        clock.now += 1
        assert keys.caller(KEY.encode()).tenant == "acme"
    assert [(record.levelno, "stay in use" in record.message) for record in caplog.records] == [(logging.ERROR, True)]
    path.write_text("[]")  # the last key was taken back
    clock.now += 1
    with pytest.raises(KeyInvalid):
        keys.caller(KEY.encode())


BAD = {
    "a key in the place of its hash": [{"tenant": "acme", "sha256": KEY}],
    "no tenant": [{"sha256": "0" * 64}],
    "a tenant with a path": [entry("../acme")],
    "a tenant that ends a line": [entry("acme\n")],
    "an empty tenant": [entry("")],
    "a long tenant": [entry("a" * 33)],
    "a typo": [entry(max_job=1)],
    "nothing allowed": [entry(max_jobs=0)],
    "a number as text": [entry(requests_per_minute="60")],
    "a time without a zone": [entry(expires="2030-01-01T00:00:00")],
    "one key of two tenants": [entry("acme"), entry("other")],
    "not a list": entry(),
    "too much": [entry()] * 10_000,
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_bad_file_stops_the_start(path, content):
    """The error names the file and what is wrong where, and quotes nothing of it."""
    path.write_text(json.dumps(content))
    with pytest.raises(SettingsInvalid, match=str(path)) as caught:
        KeyFile(path)
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_example_in_the_documentation_is_a_key_file(path):
    """What docs/api.md shows is accepted, with every field that there is."""
    text = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
    path.write_text(re.search(r"```json\n(\[.*?\n\])\n```", text, re.DOTALL)[1])
    (shown,), _ = read_entries(path)
    assert shown.model_fields_set == Entry.model_fields.keys()


def test_a_file_that_others_can_write_is_warned_of(path, caplog):
    """Whoever may write it may let anybody in."""
    path.chmod(0o666)
    KeyFile(path)
    assert "chmod" in caplog.text


def test_a_caller_does_not_show_its_key():
    """Neither a key nor its hash is in the text of a Caller, which may get into a log."""
    assert "abc" not in repr(Caller("acme", "abc"))


# --- who has to have keys


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_and_its_folder_need_no_key(host):
    """Only there nobody else can call, and nobody else's pictures lie."""
    check_exposure(Settings(), host)
    with pytest.raises(SettingsInvalid, match="s3://ours"):
        check_exposure(Settings(store=StoreSettings(url="s3://ours/pulid")), host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", "127.1", ""])
def test_every_other_address_needs_keys(path, host):
    """Without a key file the service does not start there, with a broken one neither, with a good one it does."""
    with pytest.raises(SettingsInvalid, match="pulid keys new"):
        check_exposure(Settings(), host)
    with_keys = Settings(keys=KeySettings(file=path))
    check_exposure(with_keys, host)
    path.write_text("")
    with pytest.raises(SettingsInvalid, match=str(path)):
        check_exposure(with_keys, host)


# --- the commands


def run(*arguments):
    return CliRunner().invoke(pulid, ["keys", *map(str, arguments)])


def test_a_new_key_is_shown_once_and_opens_the_file_it_was_added_to(tmp_path):
    """Standard output is the key alone; the file gets its hash, and only its owner may read it."""
    path = tmp_path / "keys.json"
    first = run("new", "acme", "--file", path, "--max-jobs", 3, "--days", 30)
    second = run("new", "other", "--file", path)
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    one, two = first.stdout.strip(), second.stdout.strip()
    assert one.startswith("pulid_")
    assert len(one) == len(new_key()) == 49
    assert one != two
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert one not in path.read_text()
    keys = KeyFile(path)
    assert (keys.caller(one.encode()).tenant, keys.caller(one.encode()).max_jobs) == ("acme", 3)
    assert keys.caller(two.encode()) == Caller("other", fingerprint(two))
    assert list(tmp_path.iterdir()) == [path]


def test_keys_that_are_added_at_once_are_all_there(tmp_path):
    """Nobody writes over what another has just added."""
    path = tmp_path / "keys.json"
    added = [Entry.model_validate(entry(key=str(number))) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(add, path), added))
    assert sorted(one.sha256 for one in read_entries(path)[0]) == sorted(one.sha256 for one in added)


def test_without_a_file_the_entry_is_printed():
    """What stands on standard error is the entry of the key on standard output."""
    result = run("new", "acme", "--requests-per-minute", 5)
    told = json.loads(result.stderr.splitlines()[-1])
    assert told == entry(key=result.stdout.strip(), requests_per_minute=5)


def test_a_key_file_keeps_its_mode_and_a_broken_one_its_bytes(path):
    """Adding a key opens the file to nobody else, and overwrites nothing that is not understood."""
    path.chmod(0o640)
    assert run("new", "acme", "--file", path).exit_code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.write_text("not yet JSON")
    result = run("new", "acme", "--file", path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert path.read_text() == "not yet JSON"


@pytest.mark.parametrize("tenant", ["Acme", "a_b", "-a", "a" * 33, "../a", ""])
def test_a_tenant_has_a_plain_name(tenant):
    """It becomes part of the names of objects in the store."""
    result = run("new", "--", tenant)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "TENANT" in result.stderr


def test_the_list_says_what_each_key_may(path, monkeypatch):
    """Tenant, limits and end of every key, from the file that the settings name; never a whole hash."""
    path.write_text(json.dumps([entry(max_jobs=2), entry("other", OTHER, expires="2020-01-01T00:00:00Z")]))
    monkeypatch.setenv("PULID_KEYS__FILE", str(path))
    result = run("list")
    assert result.stdout.splitlines()[1].split() == ["acme", fingerprint(KEY)[:8], "any", "2", "never"]
    assert "2020-01-01T00:00:00+00:00 (expired)" in result.stdout.splitlines()[2]
    assert fingerprint(KEY) not in result.stdout
