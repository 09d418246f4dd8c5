"""What callers are told of a job: one object, whether it is open or has ended, with its pictures where it has some."""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import ImageNotFound
from pipeline.job_store import JobStore
from pipeline.jobs import Job, moment, moments

PRIVATE = ("tenant", "replay", "problem")  # of a record, what is not for callers or has another name there


def open_view(job: Job, position: int | None) -> dict[str, Any]:
    """A job that is queued or running, or has ended without pictures."""
    progress = None if job.progress is None else {"step": job.progress[0], "steps": job.progress[1]}
    return {
        "id": job.id,
        "status": job.state,
        "created": moment(job.created),
        **addresses(job.id),
        "position": position if job.state == "queued" else None,
        "progress": progress,
        "attempt": job.attempt,
        **moments(job),
        "error": job.problem,
        "images": [],
        **({} if job.origin is None else {"origin": job.origin}),
    }


def final_view(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with what callers need to use it; the images of the synchronous API have the same."""
    image_id = record["id"]
    return {
        **{name: value for name, value in record.items() if name not in PRIVATE},
        **addresses(image_id),
        "status": record.get("status", "succeeded"),
        "position": None,
        "progress": None,
        "attempt": record.get("attempt") or 0,  # an image for which nobody needed a job has none
        "error": record.get("problem"),
        "images": images(record),
    }


def end_view(jobs: JobStore, job: Job) -> dict[str, Any]:
    """A job that has ended; raises ImageNotFound where it is erased, StoreError."""
    if job.state == "erased":
        raise ImageNotFound("There is no such image; check its id and number.")
    if job.state != "succeeded":
        return open_view(job, None)
    try:
        return final_view(jobs.record(job.tenant, job.id))
    except ImageNotFound:  # its owner was lost before it could settle the job
        jobs.settle(job)
        return final_view(jobs.record(job.tenant, job.id))


def images(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pictures of a record, with the addresses of their pixels."""
    kept = ("seed", "width", "height", "media_type")
    return [
        {"url": f"/v1/images/{record['id']}/{number}", **{name: picture[name] for name in kept}}
        for number, picture in enumerate(record["pictures"])
    ]


def addresses(image_id: str) -> dict[str, str]:
    """Where a job is read, watched and stopped; relative to this service."""
    address = f"/v1/images/{image_id}"
    return {"record": address, "events": f"{address}/events", "cancel": f"{address}/cancel"}
