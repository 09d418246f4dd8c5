"""`pulid` as a client of a service elsewhere: events through broken connections, retries, and what the user sees."""

import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import asynccontextmanager, closing, contextmanager

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.cli import app as pulid
from cluster.client import LONGEST_PAUSE, PAUSES, Client, JobEvent
from cluster.remote import Way
from cluster.sse import Event, events
from deployments.api import create_api
from deployments.keys import fingerprint
from pipeline.errors import (
    BadInput,
    Fault,
    IdempotencyConflict,
    ImageNotFound,
    InvalidRequest,
    KeyInvalid,
    Overloaded,
    RateLimited,
    WorkerUnavailable,
)
from pipeline.events import Stepped
from pipeline.settings import KeySettings, Settings
from tests.fakes import A_FACE, NO_FACE
from tests.loopback import DROP, Wire, scripted, serving
from tests.service import InProcess

KEY = "pulid_of-tests-only"
BODY = {"prompt": "portrait", "width": 256, "height": 256, "num_steps": 4, "num_outputs": 2, "seed": 5}
JOB = {"id": "0" * 32, "status": "queued"}


class Endless(InProcess):
    """Begins every picture and finishes none; the steps that are made are told, then `begun` is set."""

    def __init__(self, settings):
        super().__init__(settings)
        self.begun, self.stopped = threading.Event(), threading.Event()

    async def make(self, request, tenant, expires, progress=None):
        progress(0, Stepped(1, request.num_steps))
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()


def answer(value, status=200, **headers):
    return status, {name.replace("_", "-"): str(text) for name, text in headers.items()}, json.dumps(value).encode()


def problem(code, status, **headers):
    return answer({"code": code, "status": status, "detail": f"It is {code}."}, status, **headers)


def stream(text):
    return 200, {"Content-Type": "text/event-stream"}, text.encode()


def living(service):
    """A service with all of the real HTTP API, jobs and store, on a port."""

    @asynccontextmanager
    async def life(_):
        async with service.life():
            yield

    return serving(create_api(service, service.settings, life))


@pytest.fixture
def house(tmp_path):
    """The address of a service."""
    with living(InProcess(Settings(weights_dir=tmp_path))) as url:
        yield url


@pytest.fixture
def waits():
    """The seconds that clients wanted to wait; they do not."""
    return []


# --- server-sent events

STREAM = "\ufeff: hello\r\nid: 1-0\ndata: a\u2028\u0085b\n\nevent:  two\rdata\rdata: 2\r\r"
STREAM += "id: 1\x00\nretry: 250\ndata:x:y\n\n"
STREAM += "event: none\n\nid: 1-9\r\n: keep-alive\r\n\r\nretry: soon\nunknown: 1\ndata: é\r\n\r\ndata: cut off"
WANTED = [
    Event("1-0", "message", "a\u2028\u0085b"),
    Event("1-0", " two", "\n2"),
    Event("1-0", "message", "x:y", 250),
    Event("1-9", "message", "é", 250),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_events_are_read_by_the_standard(size):
    """All three line ends, a mark of byte order, comments, ids, several data lines; in whatever pieces they come."""
    data = STREAM.encode()
    assert list(events(data[start : start + size] for start in range(0, len(data), size))) == WANTED


def test_ids_go_on_from_the_last_connection():
    """An event without an id of its own is after the one that was had before."""
    assert list(events([b"data: 1\n\n"], "2-7")) == [Event("2-7", "message", "1")]


# --- following a job


@pytest.mark.parametrize("cuts", [[], [0], [5, 120], [300, 330, 360, 400, 450, 520], [700, 1, 2, 3, 4]])
def test_every_step_comes_once_and_in_order(house, waits, cuts):
    """However often the connection is cut, on its first byte or within an event, nothing is lost."""
    with closing(Wire(house, cuts, b"/events")) as wire, Client(wire.url, pause=waits.append) as client:
        job = client.submit(BODY)
        seen = list(client.follow(job["id"]))
        assert wire.cuts == []
        steps = [(event.data["number"], event.data["step"]) for event in seen if event.name == "step"]
        assert steps == [(number, step) for number in (0, 1) for step in (1, 2, 3, 4)]
        assert [event.name for event in seen if event.name not in ("step", "queued")] == ["started", "succeeded"]
        assert len(waits) == len(cuts)
        assert seen[-1].data["images"] == client.job(job["id"])["images"]
        first = client.picture(job["id"], 0)
        assert Image.open(io.BytesIO(first)).size == (256, 256)


def test_a_client_goes_on_after_the_last_event_it_had(waits):
    """Last-Event-ID is the last whole event's; pauses start anew with each, and the service may ask for longer."""
    started = stream("id: 1-0\nevent: started\ndata: {}\n\nid: 1-1\nevent: st")
    asked = stream('id: 1-1\nevent: step\nretry: 3000\ndata: {"step": 1}\n\n')
    ended = stream("id: 1-2\nevent: succeeded\ndata: {}\n\nid: 1-3\nevent: step\ndata: {}\n\n")
    busy = problem("worker_unavailable", 503, Retry_After=7)
    with (
        scripted(answer([]), started, DROP, busy, asked, ended) as script,
        Client(script.url, pause=waits.append) as client,
    ):
        with pytest.raises(BadInput):
            client.job("0")  # a list is no job; and now the service is known to be there
        seen = [event.name for event in client.follow("0")]
    assert seen == ["started", "step", "succeeded"]
    assert [headers.get("last-event-id") for _, headers, _ in script.asked[1:]] == [None, "1-0", "1-0", "1-0", "1-1"]
    assert waits == [PAUSES[0], PAUSES[1], 7.0, 3.0]


def test_following_ends_where_a_job_is_gone(waits):
    """An erased job is told, and no service that stays away is asked for ever."""
    silent = [stream(": keep-alive\n\n")] * 6
    with (
        scripted(problem("image_not_found", 404), *silent) as script,
        Client(script.url, pause=waits.append) as client,
    ):
        with pytest.raises(ImageNotFound, match="It is image_not_found"):
            list(client.follow("0"))
        assert waits == []
        with pytest.raises(WorkerUnavailable):
            list(client.follow("0"))
    assert waits == list(PAUSES)


# --- what may be sent again


def test_a_request_is_sent_again_under_one_key(waits):
    """A lost answer, a full queue and a restart cost a client no job, and make none twice."""
    full, restart = problem("overloaded", 429, Retry_After=3), problem("worker_unavailable", 503)
    with (
        scripted(answer({"identities": []}), DROP, full, restart, answer(JOB, 202)) as script,
        Client(script.url, KEY, waits.append) as client,
    ):
        assert client.identities() == []
        assert client.submit(BODY) == JOB
    sent = script.asked[1:]
    assert len({headers["idempotency-key"] for _, headers, _ in sent}) == 1
    assert all(headers["prefer"] == "respond-async" and json.loads(body) == BODY for _, headers, body in sent)
    assert all(headers["authorization"] == f"Bearer {KEY}" for _, headers, _ in sent)
    assert waits == [PAUSES[0], 3.0, PAUSES[2]]


def test_a_request_makes_one_job_though_answers_are_lost(house, waits):
    """The real service knows the key again: the answers that were cut off belong to the same job."""
    with closing(Wire(house, [0, 10], b"POST /v1/images ")) as wire, Client(wire.url, pause=waits.append) as client:
        assert client.identities() == []
        job = client.submit(BODY, "one")
        assert client.submit(BODY, "one")["id"] == job["id"]
        assert client.submit(BODY, "two")["id"] != job["id"]
        with pytest.raises(IdempotencyConflict):
            client.submit({**BODY, "seed": 6}, "one")
    assert waits == list(PAUSES[:2])


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        (problem("key_invalid", 401), KeyInvalid),
        (problem("invalid_request", 422), InvalidRequest),
        (problem("of_the_future", 422), BadInput),
        (problem("of_the_future", 500), Fault),
        (problem("rate_limited", 429, Retry_After=int(LONGEST_PAUSE) + 1), RateLimited),
        ((404, {}, b"<html>nginx</html>"), BadInput),
        ((301, {"Location": "https://a.example/"}, b""), BadInput),
        (answer("a text", 400), BadInput),
        (answer({"code": []}, 400), BadInput),
        ((200, {}, b"<html>a portal</html>"), BadInput),
    ],
)
def test_what_cannot_pass_is_told_at_once(waits, told, kind):
    """An answer that would be the same again, or one of another server, is an error with a sentence."""
    with scripted(told) as script, Client(script.url, pause=waits.append) as client, pytest.raises(kind) as raised:
        client.submit(BODY)
    assert (len(script.asked), waits) == (1, [])
    assert str(raised.value).endswith(".")
    assert "html" not in str(raised.value)


def test_patience_has_an_end(waits):
    """A queue that stays full, and a service that goes away, are told after the last pause."""
    with scripted(*[problem("overloaded", 429)] * 6) as script, Client(script.url, pause=waits.append) as client:
        with pytest.raises(Overloaded):
            client.submit(BODY)
        script.answers += [DROP] * 6
        with pytest.raises(WorkerUnavailable, match=script.url):
            client.submit(BODY)
    assert waits == 2 * list(PAUSES)


def test_a_wrong_address_is_told_at_once(waits):
    """Where nobody ever answered there is nothing to wait for; and some texts are no address, or no key."""
    with scripted() as script:
        pass
    with Client(script.url, pause=waits.append) as client, pytest.raises(WorkerUnavailable, match=script.url):
        client.submit(BODY)
    assert waits == []
    for text in ("", "pulid.example", "ftp://a.example", "http://", "http://u:p@a.example", "http://a.example:port"):
        with pytest.raises(InvalidRequest, match="--server"):
            Client(text)
    for key in ("two words", "a\nline", "clé"):
        with pytest.raises(KeyInvalid):
            Client("https://a.example", key)


def test_an_identity_is_not_stored_twice(waits):
    """What has no Idempotency-Key is sent once; the user decides about again."""
    with scripted(answer({"identities": []}), DROP) as script, Client(script.url, pause=waits.append) as client:
        client.identities()
        with pytest.raises(WorkerUnavailable):
            client.add_identity([b"a face"])
    assert (len(script.asked), waits) == (2, [])


def test_the_key_stays_with_the_service():
    """A redirect to where pictures are kept does not bring the key along; a path in an id leads nowhere else."""
    with scripted((200, {}, b"pixels")) as bucket:
        elsewhere = bucket.url.replace("127.0.0.1", "localhost")
        with (
            scripted((307, {"Location": f"{elsewhere}/p"}, b""), answer({}, 204)) as script,
            Client(script.url, KEY) as client,
        ):
            assert client.picture("0", 0) == b"pixels"
            client.remove_identity("../images/0")
    assert script.asked[0][1]["authorization"] == f"Bearer {KEY}"
    assert "authorization" not in bucket.asked[0][1]
    assert script.asked[1][0] == ("DELETE", "/v1/identities/..%2Fimages%2F0")


# --- the commands


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `pulid` in an empty folder with two photos, of a face and of none."""
    monkeypatch.chdir(tmp_path)
    for name, photo in (("me.jpg", A_FACE), ("wall.jpg", NO_FACE)):
        (tmp_path / name).write_bytes(base64.b64decode(photo))
    return lambda *arguments, **env: CliRunner().invoke(pulid, [str(one) for one in arguments], env=env)


WISH = ("--prompt", "portrait", "--width", 256, "--height", 256, "--num-steps", 4, "--seed", 5)


def test_generate_by_a_service(house, run, tmp_path):
    """Pictures are saved as those that are made here; what happens meanwhile is on standard error."""
    (tmp_path / "request.json").write_text(json.dumps({"num_outputs": 2}))
    more = ("--request", "request.json", "--photo", "me.jpg", "--output", "new/two.png")
    result = run("generate", "--server", house, *WISH, *more)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == ["new/two-0.png (256x256, seed 5)", "new/two-1.png (256x256, seed 6)"]
    assert "Done" in result.stderr
    job_id = result.stderr.split("Job ")[1].split()[0]
    made = [(tmp_path / "new" / f"two-{number}.png").read_bytes() for number in (0, 1)]
    assert made == [httpx.get(f"{house}/v1/images/{job_id}/{number}").content for number in (0, 1)]


def test_why_a_job_failed(house, run, tmp_path):
    """The service's own code and sentence, in one line; no picture."""
    result = run("generate", "--server", house, *WISH, "--photo", "wall.jpg", "--output", "a.png")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "no_face: people[0].photos[0] shows no face."
    assert not (tmp_path / "a.png").exists()


def test_the_words_of_the_bar():
    """Its place in the queue, then the step of all its pictures; from the beginning where it is taken over."""
    way, told = Way(2), []
    for name, data in (
        ("queued", {"position": 3}),
        ("started", {"attempt": 1}),
        ("step", {"number": 0, "step": 2, "steps": 4}),
        ("step", {"number": 1, "step": 1, "steps": 4}),
        ("preview", {"number": 1}),
        ("started", {"attempt": 2}),
        ("step", {"number": 0, "step": 1, "steps": 4}),
    ):
        way.hear(JobEvent(name, data))
        told.append(way.text)
    assert told == ["Queued at position 3", "Started", "Step 2 of 8", *["Step 3 of 8"] * 2, "Started", "Step 1 of 8"]


@contextmanager
def generating(url, folder):
    """`pulid generate` by a service, as a process."""
    words = [str(word) for word in ("generate", "--server", url, *WISH, "--output", folder / "a.png")]
    # Tests that run in the background of a shell ignore Ctrl-C, and so would whatever they start.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heeding}; from cluster.cli import main; main()", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def test_ctrl_c_stops_the_job_there(tmp_path):
    """The service gives up the picture, and the command says so and ends with 130."""
    service = Endless(Settings(weights_dir=tmp_path))
    with living(service) as url:
        with generating(url, tmp_path) as running:
            assert service.begun.wait(60)
            line = running.stderr.readline()  # it knows its job, and follows it
            os.kill(running.pid, signal.SIGINT)
            rest = running.communicate(timeout=60)[1]
        assert service.stopped.wait(10)
        job_id = line.split()[1]
        assert running.returncode == 130, rest
        assert f"The job {job_id} is cancelled." in rest
        assert httpx.get(f"{url}/v1/images/{job_id}").json()["status"] == "cancelled"


def test_ctrl_c_stops_a_job_whose_id_had_not_come_yet(tmp_path):
    """What the service has accepted and not yet answered is found by its key, and stopped."""
    service = Endless(Settings(weights_dir=tmp_path))
    submit, accepted, done, jobs = service.store.submit, threading.Event(), threading.Event(), []

    def answers_late(*arguments):
        jobs.append(submit(*arguments))
        if not accepted.is_set():
            accepted.set()
            done.wait(60)
        return jobs[-1]

    service.store.submit = answers_late
    with living(service) as url:
        try:
            with generating(url, tmp_path) as running:
                assert accepted.wait(60)
                os.kill(running.pid, signal.SIGINT)
                rest = running.communicate(timeout=60)[1]
        finally:
            done.set()
        assert running.returncode == 130, rest
        (job_id,) = {job_id for job_id, *_ in jobs}
        assert f"The job {job_id} is cancelled." in rest
        assert httpx.get(f"{url}/v1/images/{job_id}").json()["status"] == "cancelled"


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, run):
    """It is on no command line; PULID_API_KEY is no setting, so that a service here starts with it too."""
    keys, mine = tmp_path / "keys.json", tmp_path / "mine"
    keys.write_text(json.dumps([{"tenant": "acme", "sha256": fingerprint(KEY)}]))
    mine.write_text(f"{KEY}\n")
    service = InProcess(Settings(weights_dir=tmp_path, keys=KeySettings(file=keys)))
    with living(service) as url:
        refused = run("identities", "list", "--server", url)
        assert refused.exit_code == 1
        assert refused.stderr.startswith("key_invalid: ")
        assert run("identities", "list", "--server", url, "--key-file", mine).exit_code == 0
        assert run("identities", "list", "--server", url, PULID_API_KEY=KEY).exit_code == 0
    Settings.from_environment({"PULID_API_KEY": KEY})


def test_identities_are_added_listed_drawn_and_removed(house, run, tmp_path):
    """The id that `add` prints is the one that `generate --identity` takes, as long as it is stored."""
    added = run("identities", "add", "me.jpg", "me.jpg", "--name", "Ada", "--days", "1", "--server", house)
    assert added.exit_code == 0, added.stderr
    identity = added.stdout.strip()
    assert "cosine 1.00" in added.stderr
    listed = run("identities", "list", "--server", house).stdout.splitlines()
    assert listed[0].split() == ["id", "name", "photos", "fusion", "expires"]
    assert listed[1].split()[:4] == [identity, "Ada", "2", "mean"]
    wish = ("generate", "--server", house, *WISH, "--identity", identity, "--output", "a.png")
    drawn = run(*wish)
    assert drawn.exit_code == 0, drawn.stderr
    assert run("identities", "remove", identity, "--server", house).stdout == f"{identity} is erased.\n"
    for again in (("identities", "remove", identity, "--server", house), wish):
        gone = run(*again)
        assert (gone.exit_code, gone.stderr.splitlines()[-1].split(":")[0]) == (1, "identity_not_found")
    wall = run("identities", "add", "wall.jpg", "--server", house)
    assert wall.stderr == "no_face: photos[0] shows no face.\n"


@pytest.mark.parametrize(
    "options",
    [
        ("--server", "http://127.0.0.1:1", "--preset", "flux-dev"),
        ("--identity", "1" * 32),
        ("--key-file", "me.jpg"),
        ("--server", "http://127.0.0.1:1", "--identity", "1" * 32, "--photo", "me.jpg"),
        ("--server", "pulid.example"),
    ],
)
def test_options_that_do_not_go_together(run, options):
    """What only a service has takes --server, and what only this machine has forbids it; told in one line."""
    result = run("generate", *WISH, "--output", "a.png", *options)
    assert result.exit_code == 1
    assert "--" in result.stderr
    assert "Traceback" not in result.output
