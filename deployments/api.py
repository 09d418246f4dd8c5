"""The HTTP API, as a function of what it needs: no Ray and no model in here.

POST /v1/images              a picture of a person
GET  /v1/images/{id}         how it came about
GET  /v1/images/{id}/{n}     its pixels
GET  /v1/models              which models, under which licences
GET  /healthz                whether pictures can be made now
"""

import asyncio
import time
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import fastapi
from fastapi import FastAPI
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deployments import problems
from deployments.body import read_request
from pipeline.errors import Cancelled, DeadlineExceeded, ImageNotFound, Overloaded, PipelineError, StoreUnavailable
from pipeline.request import Request
from pipeline.settings import LimitSettings
from pipeline.stored import Content, Stored

T = TypeVar("T")
READ_SECONDS = 30  # more than the store's own tries of one call take
DESCRIPTION = "A face photo and a prompt become a picture of that person."


class Service(Protocol):
    """What the API serves; each method raises PipelineError."""

    async def generate(self, request: Request) -> Stored:
        """Make the pictures of a request and store them; cancelling it stops the work."""

    async def record(self, image_id: str) -> Mapping[str, Any]:
        """The record of a stored image."""

    async def content(self, image_id: str, number: int) -> Content:
        """A stored picture, or a link to it."""

    async def health(self) -> Mapping[str, Any]:
        """What is running; raises where no picture could be made now."""

    def models(self) -> Mapping[str, Any]:
        """The models in use, with licences."""


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


def answer(stored: Stored, seconds: float) -> dict[str, Any]:
    """What a caller is told of a stored image; `seconds` since the request arrived."""
    record, address = stored.record, f"/v1/images/{stored.id}"
    images = [
        {"url": f"{address}/{number}", **{key: picture[key] for key in ("seed", "width", "height", "media_type")}}
        for number, picture in enumerate(record["pictures"])
    ]
    return {
        "id": stored.id,
        "record": address,
        "images": images,
        "faces": record["faces"],
        "prompt_truncated": record["prompt_truncated"],
        "timings": {**record["timings"], "total": seconds},
    }


class Admission:
    """Bounds how many requests are in the making at once, and so what their bodies take of the memory."""

    def __init__(self, most: int) -> None:
        self._free = most

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place while it lasts; raises Overloaded where none is free."""
        if not self._free:
            raise Overloaded("The service has all the work it can take; try again after the time in Retry-After.")
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


async def prompt_answer(answer: Awaitable[T], silent: str) -> T:
    """What is read rather than made, within READ_SECONDS; raises StoreUnavailable."""
    try:
        return await asyncio.wait_for(answer, READ_SECONDS)
    except TimeoutError as error:
        raise StoreUnavailable(f"{silent} did not answer within {READ_SECONDS} seconds; try again.") from error


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


def create_api(service: Service, limits: LimitSettings) -> FastAPI:
    """The API of a service. Every failure is answered as application/problem+json."""
    app = FastAPI(title="PuLID Serve", version="1", description=DESCRIPTION, docs_url=None, redoc_url=None)
    app.include_router(_making(service, limits))
    app.include_router(_reading(service))
    app.add_middleware(problems.LastResort, retry_after=limits.retry_after_seconds)

    @app.exception_handler(PipelineError)
    async def _failed(_: fastapi.Request, error: PipelineError) -> Response:
        return problems.response(error, limits.retry_after_seconds)

    @app.exception_handler(HTTPException)
    async def _no_route(_: fastapi.Request, error: HTTPException) -> Response:
        return problems.http_response(error.status_code, dict(error.headers or {}))

    plain_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain_openapi()
        schemas = document["components"]["schemas"]
        schemas.update(_request_schemas())
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend the document
    return app


def _request_schemas() -> dict[str, Any]:
    schema = Request.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs", {}), "Request": schema}


def _documented(*kinds: type[PipelineError]) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for OpenAPI."""
    found: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        entry = found.setdefault(kind.status, {"description": "", "model": problems.Problem})
        entry["description"] = f"{entry['description']} `{kind.code}`: {kind.__doc__}".strip()
    return found


def _making(service: Service, limits: LimitSettings) -> fastapi.APIRouter:
    router = fastapi.APIRouter()
    admitted = Admission(limits.max_requests).admitted
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Request"}}}}

    @router.post(
        "/v1/images",
        response_model=Answer,
        responses=_documented(*problems.leaves()),
        openapi_extra={"requestBody": body},
    )
    async def make(http: fastapi.Request) -> Response:
        """Make pictures, and wait for them. With `Accept: image/*` the answer is the first of them itself."""
        started = time.perf_counter()
        try:
            async with asyncio.timeout(limits.request_seconds) as clock:
                with admitted():
                    request = await read_request(http.headers, http.stream(), limits.max_body_bytes)
                    if request.deadline_seconds is not None:
                        ends = clock.when() or 0.0
                        early = limits.request_seconds - request.deadline_seconds
                        clock.reschedule(ends - max(0.0, early))
                    stored = await service.generate(request)
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise DeadlineExceeded("It took longer than it may; try later, or with fewer steps or pixels.") from error
        except ClientDisconnect as error:
            raise Cancelled("The request was cancelled; its body did not arrive.") from error
        if not wants_picture(http.headers.get("accept", "")):
            return JSONResponse(answer(stored, time.perf_counter() - started))
        response = picture(await prompt_answer(service.content(stored.id, 0), "The store"), 303, "no-store")
        address = f"/v1/images/{stored.id}"
        response.headers.update({"Content-Location": f"{address}/0", "Link": f'<{address}>; rel="describedby"'})
        return response

    return router


def _reading(service: Service) -> fastapi.APIRouter:
    router = fastapi.APIRouter()

    @router.get("/v1/images/{image_id}", responses=_documented(ImageNotFound))
    async def record(image_id: str) -> Response:
        """The record of an image: the request without its photos, seeds, models, faces, timings."""
        return JSONResponse(await prompt_answer(service.record(image_id), "The store"))

    @router.get("/v1/images/{image_id}/{number}", responses={307: {"description": "where the pixels are"}})
    async def pixels(image_id: str, number: str) -> Response:
        """The pixels of a picture, or a redirect to them."""
        if not (number.isdecimal() and number.isascii() and len(number) < 3):
            raise ImageNotFound("There is no such image; check its id and number.")
        content = await prompt_answer(service.content(image_id, int(number)), "The store")
        return picture(content, 307, "private, max-age=86400, immutable")

    @router.get("/v1/models")
    async def models() -> Response:
        """The models in use, and their licences."""
        return JSONResponse(service.models())

    @router.get("/healthz", responses={503: {"model": problems.Problem, "description": "no picture can be made now"}})
    async def healthz() -> Response:
        """Whether pictures can be made now."""
        return JSONResponse(await prompt_answer(service.health(), "Ray's controller or the store"))

    @router.get("/problems/{code}", responses=_documented(ImageNotFound))
    async def problem(code: str) -> Response:
        """What the code of an error means."""
        known = {kind.code: kind for kind in problems.leaves()}
        if code not in known:
            raise HTTPException(404)
        return JSONResponse(problems.explain(known[code]))

    return router
