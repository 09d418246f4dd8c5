"""JobStore: what can happen to a job, as conditional writes; nothing is ever lost between two of them.

submit     requests/{id}.json, then jobs/{tenant}/{id}.json: from then on the job is accepted
claim      the job becomes an owner's; whoever had it before is fenced off
end        publish-then-commit: the pictures and a draft of their record are there before the job says `succeeded`
settle     the final record in the place of the job; may be done again, by anybody, any number of times
"""

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from pipeline.errors import IdempotencyConflict, ImageNotFound, StoreConflict, StoreCorrupt, StoreUnavailable
from pipeline.jobs import ENDS, Hook, Job, State, begun, job_key, moment, moments, named, new_id
from pipeline.objects import Objects, tenant_folder
from pipeline.request import Request
from pipeline.settings import JobSettings
from pipeline.store import ImageStore
from pipeline.stored import RECORD_VERSION, checked_id

STRAY_SECONDS = 3600  # after which a request without a job, or an image without a record, will not get one any more
SWEPT_SECONDS = 2 * 3600  # of ids before that, among which strays are looked for: several rounds of housekeeping
RACES = 20  # lost in a row by one write, before it gives up: each was won by another


@dataclass(frozen=True, slots=True)
class Held:
    """A job as it was read, and the version to name when changing it."""

    job: Job
    etag: str


@dataclass(frozen=True, slots=True)
class Listed:
    """An open job in a listing."""

    tenant: str
    id: str
    etag: str


class JobStore:
    """Jobs among a store's objects. Every method blocks, may be called from several threads, and raises StoreError."""

    def __init__(
        self, objects: Objects, images: ImageStore, settings: JobSettings, now: Callable[[], float] = time.time
    ) -> None:
        self._objects = objects
        self._images = images
        self._settings = settings
        self._now = now

    def submit(
        self,
        request: Request,
        tenant: str,
        idempotency_key: str | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> tuple[str, Job | None]:
        """Accept a request; returns its id, and its job, or None where its Idempotency-Key had been used for it before.

        `origin`: JSON values that are kept with the job and its record. Raises IdempotencyConflict where the key came
        with another request.
        """
        job_id, replay = new_id(), None
        if idempotency_key is not None:
            hashed = hashlib.sha256(idempotency_key.encode()).hexdigest()
            replay = f"{tenant_folder('idempotency', tenant)}{hashed}.json"
            first = self._first_use(replay, job_id, _fingerprint(request))
            if first != job_id and self._known(tenant, first):
                return first, None
            job_id = first
        return job_id, self._create(request, tenant, job_id, replay, origin)

    def read(self, tenant: str, job_id: str) -> Held | None:
        """An open job of a tenant's; None where there is none, or none of theirs."""
        found = self._objects.get(job_key(tenant, checked_id(job_id)))
        return None if found is None else Held(Job.from_json(found.data), found.etag)

    def record(self, tenant: str, job_id: str) -> Mapping[str, Any]:
        """The final record of a job or image that has ended; raises ImageNotFound."""
        return self._images.record(job_id, tenant)

    def request(self, job: Job) -> Request | None:
        """The whole request of an open job; None where the job has ended meanwhile. Raises StoreCorrupt."""
        found = self._objects.get(_request_key(job.id))
        try:
            return None if found is None else Request.model_validate_json(found.data)
        except ValidationError:  # whose text would quote it
            raise StoreCorrupt("A job's request is damaged, or of another version; send it again.") from None

    def open_jobs(self) -> Iterator[Listed]:
        """All open jobs, without reading them."""
        for entry in self._objects.list("jobs/"):
            name = named(entry.key)
            if name is not None:
                yield Listed(*name, entry.etag)

    def change(self, held: Held, **changes: Any) -> Held:
        """The job's next version; raises StoreConflict where another has come in between."""
        if changes.get("state") in ENDS:
            changes.setdefault("finished", self._now())
        job = held.job.changed(**changes)
        return Held(job, self._objects.replace(job.key, job.to_json(), held.etag))

    def tell(self, held: Held, **changes: Any) -> Held:
        """The same with its webhook's state changed."""
        return self.change(held, hook=None if held.job.hook is None else replace(held.job.hook, **changes))

    def claim(self, held: Held, owner: str) -> Held:
        """The job as the owner's own; raises StoreConflict where somebody else was first."""
        job = held.job
        started = self._now() if job.started is None else job.started
        lost = job.lost + (job.state == "running")  # who gives a job back writes `queued`
        taken = {"attempt": job.attempt + 1, "lost": lost, "owner": owner, "progress": None, "started": started}
        return self.change(held, state="running", **taken)

    def stop(self, tenant: str, job_id: str, state: State) -> Held | None:
        """End an open job as `cancelled` or `erased` whatever its owner does; None where it is not open.

        The owner, if there is one, finds at its next write that it has lost the job.
        """
        for _ in range(RACES):
            held = self.read(tenant, job_id)
            if held is None or held.job.state in (state, "erased") or (held.job.over and state != "erased"):
                return held
            try:
                return self.change(held, state=state, owner="")
            except StoreConflict:
                continue  # a heartbeat, most likely
        raise StoreUnavailable("The job changes too quickly to be stopped; try again.")

    def published(self, job: Job) -> int | None:
        """The latest attempt whose pictures are all in the store, though nobody committed them; None: there is none."""
        drafts = (attempt for attempt in range(job.attempt, 0, -1) if self._images.draft(job.id, attempt) is not None)
        return next(drafts, None)

    def settle(self, job: Job) -> None:
        """Make the end of a job final: its record in place, its photos and what lost attempts left gone.

        Nothing is done where the job is no longer there, or another one: it was settled, or is being erased.
        """
        if job.state == "erased":
            self._images.erase(job.id)
            self._unuse(job.replay, job.id)
        else:
            record = self._final(job)
            held = self.read(job.tenant, job.id)
            if held is None or held.job.state != job.state:
                return
            if record is not None:
                self._images.commit(job.id, record)
            self._images.prune(job.id)
        self._objects.delete(_request_key(job.id))

    def forget(self, held: Held) -> None:
        """The job is settled, and its record or its absence says all there is to say; unless it has changed again."""
        found = self._objects.get(held.job.key)
        if found is not None and found.etag == held.etag:
            self._objects.delete(held.job.key)

    def erase(self, tenant: str, job_id: str) -> None:
        """Remove a job or an image with all that belongs to it; raises ImageNotFound."""
        stopped = self.stop(tenant, job_id, "erased")
        if stopped is not None:
            self.settle(stopped.job)  # and once more a lease later, when nobody can be at work on it any more
            return
        record = self.record(tenant, job_id)
        self._images.erase(job_id)
        self._unuse(record.get("replay"), job_id)

    def sweep(self) -> int:
        """Erase requests and images that nobody will complete, and old Idempotency-Keys; returns how many."""
        old = self._now() - STRAY_SECONDS
        erased = self._images.sweep(old - SWEPT_SECONDS, old, lambda: {listed.id for listed in self.open_jobs()})
        requests = [entry.key for entry in self._objects.list("requests/")]
        wanted = {_request_key(listed.id) for listed in self.open_jobs()}  # after them, so that none is missed
        for key in requests:
            if key not in wanted and begun(key.removeprefix("requests/")) < old:
                self._objects.delete(key)
                erased += 1
        for entry in self._objects.list("idempotency/"):
            found = self._objects.get(entry.key)
            use = {} if found is None else json.loads(found.data)
            if use and use["created"] + self._settings.replay_seconds < self._now():
                self._unuse(entry.key, use["id"])
                erased += 1
        return erased

    def _unuse(self, replay: str | None, job_id: str) -> None:
        """Let an Idempotency-Key be used anew, unless it stands for another job by now."""
        found = None if replay is None else self._objects.get(replay)
        if replay is not None and found is not None and json.loads(found.data)["id"] == job_id:
            self._objects.delete(replay)

    def _known(self, tenant: str, job_id: str) -> bool:
        if self.read(tenant, job_id) is not None:
            return True
        try:
            self.record(tenant, job_id)
        except ImageNotFound:
            return False
        return True

    def _first_use(self, key: str, job_id: str, fingerprint: str) -> str:
        """The id that an Idempotency-Key stands for: `job_id`, unless it has been used before."""
        wanted = json.dumps({"id": job_id, "fingerprint": fingerprint, "created": self._now()}).encode()
        for _ in range(RACES):
            found = self._objects.get(key)
            try:
                if found is None:
                    self._objects.create(key, wanted)
                    return job_id
                first = json.loads(found.data)
                if first["created"] + self._settings.replay_seconds < self._now():
                    self._objects.replace(key, wanted, found.etag)
                    return job_id
            except StoreConflict:
                continue
            if first["fingerprint"] != fingerprint:
                raise IdempotencyConflict("This Idempotency-Key came with another request before; use a new key.")
            return str(first["id"])
        raise StoreUnavailable("Too many requests use one Idempotency-Key at once; try again.")

    def _create(
        self, request: Request, tenant: str, job_id: str, replay: str | None, origin: Mapping[str, Any] | None
    ) -> Job | None:
        """The new job; None where an equal request under the same Idempotency-Key was quicker."""
        now = self._now()
        seconds = min(request.deadline_seconds or self._settings.deadline_seconds, self._settings.deadline_seconds)
        hook = None if request.webhook is None else Hook(request.webhook, request.webhook_events)
        job = Job(
            job_id,
            tenant,
            now,
            now + seconds,
            priority=request.priority,
            hook=hook,
            replay=replay,
            origin=origin,
            beat=secrets.randbits(32),  # so that of two who create one job at once, one is refused
        )
        try:
            self._objects.create(_request_key(job_id), request.with_seed().model_dump_json().encode())
        except StoreConflict:  # the other may have been broken off here
            if replay is None:
                raise
        try:
            self._objects.create(job.key, job.to_json())
        except StoreConflict:
            if replay is None:
                raise
            return None
        return job

    def _final(self, job: Job) -> dict[str, Any] | None:
        extra: dict[str, Any] = {"status": job.state, "attempt": job.attempt, "replay": job.replay, **moments(job)}
        if job.origin is not None:
            extra["origin"] = job.origin
        if job.state == "succeeded":
            draft = self._images.draft(job.id, job.attempt)
            if draft is None:  # settled before
                return None
            timings = {**draft["timings"], "total": (job.finished or job.created) - job.created}
            return {**draft, **extra, "timings": timings}
        record = {"version": RECORD_VERSION, "id": job.id, "tenant": job.tenant, "created": moment(job.created)}
        return {**record, **extra, "pictures": [], "problem": job.problem}


def _request_key(job_id: str) -> str:
    return f"requests/{job_id}.json"


def _fingerprint(request: Request) -> str:
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()
