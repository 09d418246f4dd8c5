"""What the HTTP API answers, as the OpenAPI document describes it."""

from collections.abc import Mapping
from typing import Any, Literal

from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field

from deployments.job_view import addresses, images
from deployments.problems import Problem
from pipeline.stored import Content, Stored


class Image(BaseModel):
    """One picture of an answer."""

    url: str = Field(description="its pixels; relative to this service")
    seed: int
    width: int
    height: int
    media_type: str


class UsedFace(BaseModel):
    """A face that the identity came from."""

    photo: int = Field(description="index in the person's photos")
    box: tuple[float, float, float, float] = Field(description="left, top, right, bottom in the photo's pixels")
    score: float


class Answer(BaseModel):
    """The pictures of a request."""

    id: str
    record: str = Field(description="the address of the whole record")
    images: list[Image]
    faces: list[list[UsedFace]] = Field(description="per person, one face per photo")
    prompt_truncated: bool = Field(description="whether the prompt was longer than max_sequence_length")
    timings: dict[str, float] = Field(description="seconds per stage, and in total")


class JobProgress(BaseModel):
    """How far a running job is."""

    step: int = Field(description="steps that are done")
    steps: int = Field(description="steps in all")


class JobAnswer(BaseModel):
    """A job: work that goes on without its caller. Once it has succeeded, its record's fields are here as well."""

    model_config = {"extra": "allow"}

    id: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created: str = Field(description="when it was accepted, ISO 8601 in UTC")
    record: str = Field(description="the address of this object")
    events: str = Field(description="the address of its events, as a stream")
    cancel: str = Field(description="the address to post to in order to stop it")
    position: int | None = Field(description="queued jobs before it; null unless queued")
    progress: JobProgress | None
    attempt: int = Field(description="how often it was begun; more than 1 where a worker was lost")
    started: str | None = Field(None, description="when it was first begun; null before, and where no job was needed")
    finished: str | None = Field(None, description="when it ended")
    error: Problem | None = Field(description="why it failed")
    images: list[Image] = Field(description="its pictures, once it has succeeded")


def answer(stored: Stored, seconds: float) -> dict[str, Any]:
    """What a caller is told of a stored image; `seconds` since the request arrived."""
    record = stored.record
    return {
        "id": stored.id,
        "record": addresses(stored.id)["record"],
        "images": images(record),
        "faces": record["faces"],
        "prompt_truncated": record["prompt_truncated"],
        "timings": {**record["timings"], "total": seconds},
    }


def job_answer(view: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller who waited is told of a job that has succeeded: the same as of an image."""
    return {name: view[name] for name in ("id", "record", "images", "faces", "prompt_truncated", "timings")}


def wants_picture(accept: str) -> bool:
    """Whether a caller asks for the picture itself in the place of JSON that names it."""
    return any(kind.strip().lower().startswith("image/") for kind in accept.split(","))


def picture(content: Content, redirect: int, cache: str) -> Response:
    """The pixels of a picture, or a redirect (by that status) to them."""
    if content.link is not None:
        return RedirectResponse(content.link, redirect, {"Cache-Control": "no-store"})
    headers = {
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Content-Disposition": "inline",
        "Cache-Control": cache,
    }
    return Response(content.data, 200, headers, content.media_type)
