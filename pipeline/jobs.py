"""Job: a request that goes on without its caller. The store's record of it is the truth about it.

    queued -> running -> succeeded, failed or cancelled       and from each of these to erased

A job is run by an owner under a lease: `attempt` grows with every claim and fences the attempts before it, since every
write names the version that it replaces. Who has lost the lease finds out at its next write, which is refused.

    jobs/{tenant}/{id}.json      an open job; there until its end is settled
    requests/{id}.json           its whole request, photos included; erased when it ends
    idempotency/{tenant}/{key's sha256}.json    under which id a key was first used
"""

import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from pipeline.errors import StoreCorrupt
from pipeline.objects import NO_TENANT, tenant_folder

State = Literal["queued", "running", "succeeded", "failed", "cancelled", "erased"]
ENDS = ("succeeded", "failed", "cancelled", "erased")
VERSION = 1
KEY = re.compile(r"jobs/(_|[a-z0-9][a-z0-9-]{0,31})/([0-9a-f]{32})\.json")


@dataclass(frozen=True, slots=True)
class Hook:
    """Where to tell what happens to a job, and how far telling its end has come.

    tries: of telling the end; due: seconds since 1970, before which there is no further one; over: told, or given up.
    """

    url: str
    events: tuple[str, ...]
    tries: int = 0
    due: float = 0.0
    over: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One version of a job.

    created, deadline, finished: seconds since 1970. attempt: how often it was claimed. beat: grows with every write,
    so that no two versions are the same bytes. progress: steps done and in all, of all its pictures. problem: what it
    failed with. lost: how many of its attempts lost it without giving it back. replay: its idempotency object.
    started: when it was first begun, in seconds since 1970.
    origin: what the foreign API by which it came, if it did, has to know again when telling of it.
    """

    id: str
    tenant: str
    created: float
    deadline: float
    state: State = "queued"
    priority: int = 0
    attempt: int = 0
    lost: int = 0
    owner: str = ""
    beat: int = 0
    progress: tuple[int, int] | None = None
    problem: Mapping[str, Any] | None = None
    hook: Hook | None = None
    replay: str | None = None
    started: float | None = None
    finished: float | None = None
    origin: Mapping[str, Any] | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will be computed for it."""
        return self.state in ENDS

    @property
    def haunted(self) -> bool:
        """Whether an attempt that does not know that it has lost the job may still write something of it."""
        return self.lost > 0 or (self.state in ("cancelled", "erased") and self.attempt > 0)

    @property
    def key(self) -> str:
        """Where it is kept."""
        return job_key(self.tenant, self.id)

    def changed(self, **changes: Any) -> "Job":
        """Its next version."""
        return replace(self, beat=self.beat + 1, **changes)

    def to_json(self) -> bytes:
        """As the bytes that are stored."""
        return json.dumps({"version": VERSION, **asdict(self)}, allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Job":
        """From stored bytes; raises StoreCorrupt."""
        try:
            values = json.loads(data)
            if values.pop("version") != VERSION:
                raise StoreCorrupt("A job's record is of another version of this service; send its request again.")
            hook, progress = values.pop("hook"), values.pop("progress")
            if hook is not None:
                hook = Hook(**{**hook, "events": tuple(hook["events"])})
            return cls(**values, hook=hook, progress=None if progress is None else (progress[0], progress[1]))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise StoreCorrupt("A job's record is damaged; send its request again.") from error


def new_id() -> str:
    """An id that sorts by its time and cannot be guessed: 12 hexadecimal digits of milliseconds, 20 at random."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def begun(job_id: str) -> float:
    """When an id was made, in seconds since 1970."""
    return int(job_id[:12], 16) / 1000


def job_key(tenant: str, job_id: str) -> str:
    """Where a tenant's job is kept."""
    return f"{tenant_folder('jobs', tenant)}{job_id}.json"


def named(key: str) -> tuple[str, str] | None:
    """The tenant and id in the key of a job; None for what is no such key."""
    found = KEY.fullmatch(key)
    return None if found is None else ("" if found[1] == NO_TENANT else found[1], found[2])


def moment(seconds: float) -> str:
    """Seconds since 1970 as callers read them."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def moments(job: Job) -> dict[str, str | None]:
    """When a job was begun and when it ended, as callers read it."""
    found = {"started": job.started, "finished": job.finished}
    return {name: None if seconds is None else moment(seconds) for name, seconds in found.items()}


def in_turn(jobs: Iterable[Job]) -> list[Job]:
    """The queued ones of some open jobs in the order in which they are taken up.

    By priority; of equal ones each tenant's first (after those that it has running) before anybody's second; then by
    age, so that a tenant with many jobs holds up only itself.
    """
    taken, turns = Counter[str](), list[tuple[int, int, str, Job]]()
    for job in sorted(jobs, key=lambda job: (job.state == "queued", -job.priority, job.id)):
        if not job.over:
            taken[job.tenant] += 1
        if job.state == "queued":
            turns.append((-job.priority, taken[job.tenant], job.id, job))
    return [job for *_, job in sorted(turns, key=lambda turn: turn[:3])]
