"""What the tests of failures need: stages that wait where a test says, and a store that kills whoever writes.

Everything is told through notes in `settings.weights_dir`, as the stages run in other processes:
    hold-{kind}      calls of that stage wait while it is there; held-{kind}-{pid} says that one does
    die              "before create images/.*png": whoever makes such a write dies, before or after it; it happens once
"""

import hashlib
import json
import os
import re
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
from ray import serve

from bench.soak_service import audit, ongoing, replicas
from deployments.app import Parts, wire
from pipeline.curves import Curves
from pipeline.engine import Engine
from pipeline.settings import EngineSettings, JobSettings, KeySettings, LimitSettings, Settings
from pipeline.store import open_objects
from tests import s3
from tests.fakes import A_FACE, FakeDenoise, FakeFaces, FakeIdentity, FakeText, note, notes

STEP_SECONDS = 0.08
KEYS = {"acme": "pulid_of-acme", "globex": "pulid_of-globex"}
STAGES = ("FaceDetector", "TextEncoder", "IdentityEncoder", "FluxDenoiser")
RUNNING = 2  # jobs in the making in one ingress replica, of which there are two
JOBS = JobSettings(lease_seconds=2, scan_seconds=0.2, max_running=RUNNING)
SLOW = "slow"  # as a prompt: each step takes STEP_SECONDS


def wait_while_held(folder, kind):
    """What a stage does at the begin of a call."""
    if Path(folder, f"hold-{kind}").exists():
        note(folder, "held", kind, os.getpid())
    while Path(folder, f"hold-{kind}").exists():
        threading.Event().wait(0.02)


class HeldFaces(FakeFaces):
    def detect(self, person, index, tenant="", cancelled=None):
        wait_while_held(self.folder, "FaceDetector")
        return super().detect(person, index, tenant, cancelled)


class HeldIdentity(FakeIdentity):
    def encode(self, faces, fusion, tenant=""):
        wait_while_held(self.folder, "IdentityEncoder")
        return super().encode(faces, fusion, tenant)


class HeldText(FakeText):
    def encode(self, prompt, length):
        wait_while_held(self.folder, "TextEncoder")
        return super().encode(prompt, length)


class CountedEngine(Engine):
    """Says at which of its steps it was told to cancel a picture."""

    def cancel(self, ticket):
        if not ticket.cancelled and ticket.drawing is not None:
            note(ticket.drawing.folder, "told", ticket.work.seed, self.stats().steps, ticket.done)
        super().cancel(ticket)


class SlowDenoise(FakeDenoise):
    """Steps of a slow picture take their time; endless ones too."""

    def engine(self):
        return CountedEngine(self, Curves(), self.limits.max_jobs, preview_steps=self.limits.preview_steps)

    def relieve(self, error):
        return False

    def advance(self, drawings):
        wait_while_held(self.folder, "FluxDenoiser")
        if any(drawing.work.request.prompt.startswith(SLOW) for drawing in drawings):
            threading.Event().wait(STEP_SECONDS)
        super().advance(drawings)


class DeadlyObjects:
    """The objects of the settings, for whose writers a test may have prepared an end."""

    def __init__(self, settings):
        self._objects, self._folder = open_objects(settings.store), Path(settings.weights_dir)

    def __getattr__(self, name):
        return getattr(self._objects, name)

    def _deadly(self, call, key):
        """The moment at which to die of a call: "before", "after" or none."""
        try:
            moment, pattern = (self._folder / "die").read_text().split(" ", 1)
        except OSError:
            return None
        return moment if re.fullmatch(pattern, f"{call} {key}") else None

    def _written(self, call, key, write):
        moment = self._deadly(call, key)
        if moment == "before":
            self._die()
        result = write()
        if moment == "after":
            self._die()
        return result

    def _die(self):
        try:
            (self._folder / "die").rename(self._folder / f"died-{os.getpid()}")
        except OSError:  # somebody else was quicker
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def create(self, key, *arguments):
        return self._written("create", key, lambda: self._objects.create(key, *arguments))

    def replace(self, key, data, *arguments):
        job = json.loads(data)
        etag = self._written(job.get("state"), key, lambda: self._objects.replace(key, data, *arguments))
        if job.get("state") == "running":
            note(self._folder, "runs", job["id"], job["attempt"], os.getpid())
        return etag

    def delete(self, key):
        return self._written("delete", key, lambda: self._objects.delete(key))


@contextmanager
def held(folder, kind):
    """Calls of a stage wait meanwhile."""
    hold = Path(folder, f"hold-{kind}")
    hold.touch()
    try:
        yield
    finally:
        hold.unlink()


def prepare_death(folder, moment, pattern):
    """Whoever makes a matching write (a full match of "call key") dies `before` or `after` it, once.

    The call is create, delete, or the state that a job is changed to.
    """
    Path(folder, "die.new").write_text(f"{moment} {pattern}")
    Path(folder, "die.new").rename(Path(folder, "die"))


def pids(kind):
    """The processes of a deployment that take requests."""
    return {replica.pid for replica in replicas() if replica.kind == kind}


PARTS = Parts(HeldFaces, HeldIdentity, HeldText, SlowDenoise, DeadlyObjects)


def until(condition, seconds=40):
    """What a condition gives once it gives something; it happens in another process."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.05)
    return found


class House:
    """The application on its cluster, and a caller with the keys of both tenants."""

    def __init__(self, settings, port):
        self.settings, self.folder = settings, settings.weights_dir
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False, limits=httpx.Limits(max_connections=200)
        )
        self.objects = open_objects(settings.store)
        self.accepted = {}

    def deploy(self, **options):
        quick = {"health_check_period_s": 1, **options}  # so that Serve finds out soon who is gone
        shares = dict.fromkeys((*STAGES, "Board"), quick) | {"Ingress": {**quick, "num_replicas": 2}}
        serve.run(wire(self.settings, PARTS, shares), name="pulid")

    def send(self, method, path, tenant="acme", headers=(), **options):
        """One call, once."""
        headers = {"authorization": f"Bearer {KEYS[tenant]}", **dict(headers)}
        return self.client.request(method, path, headers=headers, **options)

    def insist(self, *arguments, **options):
        """One call, sent again where it met a replica that was lost or a full house, as a client does."""

        def answered():
            try:
                answer = self.send(*arguments, **options)
            except httpx.HTTPError:
                return None
            return answer if answer.status_code < 500 and answer.status_code != 429 else None

        return until(answered, 60)

    def submit(self, prompt="portrait", tenant="acme", key=None, prefer="respond-async", **fields):
        """The answer to a request that may be sent again without being carried out again."""
        key = key or os.urandom(8).hex()
        headers = {"idempotency-key": key, **({"prefer": prefer} if prefer else {})}
        wanted = body(prompt, **fields)
        answer = self.insist("POST", "/v1/images", tenant, headers, json=wanted)
        assert answer.status_code in (200, 202), answer.text
        self.accepted[answer.json()["id"]] = tenant
        return answer

    def job(self, *arguments, **fields):
        return self.submit(*arguments, **fields).json()["id"]

    def view(self, job_id, tenant="acme"):
        answer = self.insist("GET", f"/v1/images/{job_id}", tenant)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ended(self, job_id, tenant="acme"):
        """A job once it has ended."""

        def over():
            view = self.view(job_id, tenant)
            return view["status"] not in ("queued", "running") and view

        return until(over, 60)

    def succeeded(self, job_id, tenant="acme"):
        """A job that has to end well, and the whole store with it."""
        view = self.ended(job_id, tenant)
        assert view["status"] == "succeeded", view
        self.sound()
        return view

    def sound(self):
        """Each job that was accepted has ended once, with all its pictures, and nothing else is left."""
        limit = time.monotonic() + 30
        while not (found := audit(self.objects, self.accepted)).clean:
            assert time.monotonic() < limit, found
            threading.Event().wait(0.05)

    def runs(self, job_id, attempt=1):
        """The process that makes an attempt at a job, once it is made."""
        (pid,) = until(lambda: notes(self.folder, "runs", job_id, str(attempt)))
        return int(pid)

    def idle(self):
        """No replica has a call open, but for the board, where each ingress replica waits for notices."""

        def counts():
            found = replicas()
            waiting = sum(replica.kind == "Ingress" for replica in found)
            return waiting == 2 and all(
                ongoing(replica) == (waiting if replica.kind == "Board" else 0) for replica in found
            )

        until(counts)


def body(prompt, **fields):
    people = [{"photos": [A_FACE]}]
    return {"prompt": prompt, "width": 256, "height": 256, "seed": 7, "num_steps": 4, "people": people, **fields}


def settings(folder, store):
    file = folder / "keys.json"
    entries = [{"tenant": tenant, "sha256": hashlib.sha256(key.encode()).hexdigest()} for tenant, key in KEYS.items()]
    file.write_text(json.dumps(entries))
    return Settings(
        weights_dir=folder,
        store=store,
        limits=LimitSettings(max_requests=8, request_seconds=60),
        engine=EngineSettings(max_jobs=16),
        keys=KeySettings(file=file),
        jobs=JOBS,
    )


class Away:
    """An S3 server, as the proxy in front of it lets it be seen; `refused` are the calls while it was `gone`."""

    def __init__(self):
        self.gone, self.refused, self._passes = threading.Event(), [], s3.one_at_a_time()

    def __call__(self, call):
        if self.gone.is_set():
            self.refused.append((call.method, call.path))
            s3.hangs_up(call)
        else:
            self._passes(call)


def events(house, job_id, last, until_step=None):
    """The events of a job beyond a position, up to a step or the end of the stream."""
    headers = {"authorization": f"Bearer {KEYS['acme']}", "last-event-id": last}
    with house.client.stream("GET", f"/v1/images/{job_id}/events", headers=headers) as stream:
        found = {}
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            found[name] = value
            if not line and "event" in found:
                data = json.loads(found["data"])
                yield found["id"], found["event"], data
                if until_step is not None and data.get("step") == until_step:
                    return
                found = {}
