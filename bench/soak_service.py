"""The service that a soak runs against, seen from outside: its replicas, their memory, and what its store holds."""

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.objects import Objects

PAGE = os.sysconf("SC_PAGE_SIZE")
APPLICATION = "pulid"
ENDS = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica that takes requests: its process, and its actor's name."""

    kind: str
    pid: int
    actor: str


def replicas() -> list[Replica]:
    """Those of the application, as Serve's controller knows them."""
    from ray.serve.context import _get_global_client  # noqa: TID251 - the one place that tells the processes

    details = _get_global_client().get_serve_details()["applications"][APPLICATION]["deployments"]
    return [
        Replica(kind, replica["pid"], replica["actor_name"])
        for kind, deployment in details.items()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING" and alive(replica["pid"])
    ]


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill(replica: Replica) -> None:
    """As a machine that fails: at once, and without a word."""
    os.kill(replica.pid, signal.SIGKILL)


def ongoing(replica: Replica) -> int:
    """The calls that Serve counts in a replica now."""
    import ray  # noqa: TID251

    actor = ray.get_actor(replica.actor, namespace="serve")
    return int(ray.get(actor.get_num_ongoing_requests.remote(), timeout=10))


def megabytes(pid: int) -> float:
    """Memory of a process in MB, without what it shares with others; 0 where it has ended."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0.0
    return (int(resident) - int(shared)) * PAGE / 1e6


@dataclass(frozen=True, slots=True)
class Audit:
    """What is wrong in a store: by the kind of fault, the ids or keys that have it."""

    lost: list[str]
    doubled: list[str]
    stray: list[str]

    @property
    def clean(self) -> bool:
        """Whether nothing is."""
        return not (self.lost or self.doubled or self.stray)


def audit(objects: Objects, accepted: Mapping[str, str]) -> Audit:
    """Whether each job (id: tenant) ended exactly once, with all its pictures, and nothing else is left.

    Lost: without a record, or a record without its pictures. Doubled: with more pictures than its record names.
    Stray: open jobs, requests, and images of whatever was not accepted.
    """
    names: dict[str, set[str]] = {}
    for entry in objects.list("images/"):
        _, image_id, name = entry.key.split("/")
        names.setdefault(image_id, set()).add(name)
    lost, doubled = [], []
    for job_id, tenant in accepted.items():
        record = _record(objects, job_id)
        wanted = {picture["file"] for picture in record.get("pictures", ())}
        whole = record.get("tenant") == tenant and record.get("status", "succeeded") in ENDS
        if not record or not whole or len(wanted) != _pictures(record) or not wanted <= names.get(job_id, set()):
            lost.append(job_id)
        elif names.get(job_id, set()) - wanted - {"record.json"}:
            doubled.append(job_id)
    stray = [entry.key for prefix in ("jobs/", "requests/") for entry in objects.list(prefix)]
    return Audit(lost, doubled, stray + [f"images/{image_id}" for image_id in names if image_id not in accepted])


def _record(objects: Objects, job_id: str) -> dict[str, Any]:
    found = objects.get(f"images/{job_id}/record.json")
    record: dict[str, Any] = {} if found is None else json.loads(found.data)
    return record


def _pictures(record: Mapping[str, Any]) -> int:
    """How many there have to be; an image that no job made has no status."""
    drawn = record and record.get("status", "succeeded") == "succeeded"
    return int(record["request"]["num_outputs"]) if drawn else 0
