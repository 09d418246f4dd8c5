"""What Replicate's API tells of a job, of the model and of files, as JSON values."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from deployments.job_view import open_view
from deployments.replicate_body import MODEL, OWN, OWN_VERSION, input_schema, said
from pipeline.jobs import ENDS, Job, begun, moment
from pipeline.stored import ENDINGS

PREDICTIONS, FILES = "/v1/predictions", "/v1/files"
STATUS = {"queued": "starting", "running": "processing", "cancelled": "canceled"}
BAR = 20  # characters of a progress bar
COG = "0.9.0"  # a version of Replicate's builder by which its SDK reads a schema as it stands there


def origin(base: str, model: str, version: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept with a job that came by this API; `base`: where this service is, `given`: replicate_body.echo's."""
    return {"api": "replicate", "base": base, "model": model, "version": version, "input": dict(given)}


def prediction(view: Mapping[str, Any], base: str) -> dict[str, Any]:
    """A job, by whichever API it came; `view`: see deployments.job_view."""
    came = view.get("origin") or origin(base, OWN, OWN_VERSION, {})
    address = f"{base}{PREDICTIONS}/{view['id']}"
    created, started, finished = moment(begun(view["id"])), view.get("started"), view.get("finished")
    if finished is None and view["status"] in ENDS:  # an image for which nobody needed a job
        finished = view["created"]
    error = view["error"]
    return {
        "id": view["id"],
        "model": came["model"],
        "version": came["version"],
        "input": came["input"],
        "output": outputs(view, base) if view["status"] == "succeeded" else None,
        "error": None if error is None else said(error["detail"], came["input"]),
        "status": STATUS.get(view["status"], view["status"]),
        "logs": _logs(view),
        "created_at": created,
        "started_at": started,
        "completed_at": finished,
        "metrics": {"predict_time": _seconds(started, finished)} if started and finished else {},
        "urls": {"get": address, "cancel": f"{address}/cancel", "stream": f"{address}/stream"},
        "data_removed": False,
        "source": "api",
    }


def created(view: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The same in answer to its making: one that has not ended is `starting`, since SDKs take all else for an end."""
    told = prediction(view, base)
    return told if view["status"] in ENDS else {**told, "status": "starting"}


def outputs(view: Mapping[str, Any], base: str) -> list[str]:
    """The addresses of a job's pictures; they end as their files would."""
    address = f"{base}{PREDICTIONS}/{view['id']}/output"
    return [f"{address}/{number}.{ENDINGS[image['media_type']]}" for number, image in enumerate(view["images"])]


def webhook(job: Job, data: Mapping[str, Any]) -> dict[str, Any]:
    """What the webhook of a job that came by this API is told: the prediction, as it is then.

    `data`: the view of a job that has ended, or an event on the way.
    """
    view = data if "images" in data or job.over else {**open_view(job, None), "progress": _progress(data)}
    return prediction(view, (job.origin or {})["base"])


def bar(step: int, steps: int) -> str:
    """A line of a log, from which SDKs read how far a prediction is."""
    done = step * BAR // steps
    return f"{step * 100 // steps:3d}%|{'█' * done}{' ' * (BAR - done)}| {step}/{steps}"


def model(owner: str, base: str) -> dict[str, Any]:
    """The model that is served, by the owner whom the caller names."""
    return {
        "url": f"{base}/v1/models/{owner}/{MODEL}",
        "owner": owner,
        "name": MODEL,
        "description": "A face photo and a prompt become a picture of that person.",
        "visibility": "public",
        "github_url": None,
        "paper_url": "https://arxiv.org/abs/2404.16022",
        "license_url": None,
        "run_count": 0,
        "cover_image_url": None,
        "default_example": None,
        "latest_version": version(OWN_VERSION),
    }


def version(version_id: str) -> dict[str, Any]:
    """A version of the model: what its input and output look like."""
    output = {"type": "array", "title": "Output", "items": {"type": "string", "format": "uri"}}
    return {
        "id": version_id,
        "created_at": moment(0),
        "cog_version": COG,
        "openapi_schema": {
            "openapi": "3.0.2",
            "info": {"title": MODEL, "version": "1"},
            "paths": {},
            "components": {"schemas": {"Input": input_schema(), "Output": output}},
        },
    }


def page(results: list[dict[str, Any]]) -> dict[str, Any]:
    """All of something, which fits on one page."""
    return {"previous": None, "next": None, "results": results}


def file(record: Mapping[str, Any], base: str) -> dict[str, Any]:
    """A file, from its record in pipeline.uploads."""
    kept = ("id", "name", "content_type", "size", "metadata")
    return {
        **{name: record[name] for name in kept},
        "etag": record["sha256"],
        "checksums": {"sha256": record["sha256"]},
        "created_at": record["created"],
        "expires_at": record["expires"],
        "urls": {"get": f"{base}{FILES}/{record['id']}"},
    }


def _logs(view: Mapping[str, Any]) -> str:
    if view["status"] == "succeeded":
        steps = sum(picture["steps"] for picture in view["pictures"])
        return bar(steps, steps)
    progress = view["progress"]
    return "" if progress is None else bar(progress["step"], progress["steps"])


def _progress(data: Mapping[str, Any]) -> dict[str, int] | None:
    return {"step": data["step"], "steps": data["steps"]} if "step" in data else None


def _seconds(start: str, end: str) -> float:
    return round((datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds(), 3)
