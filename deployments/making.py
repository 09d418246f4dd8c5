"""POST /v1/images: pictures for a caller who waits, or a job for one who does not.

Without a preference the caller waits, and a closed connection stops the work: nobody could ever learn of its result.
With `Prefer: respond-async` or `wait=N`, an Idempotency-Key or a webhook the request becomes a job, which is in the
store before anything is made of it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import fastapi
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from deployments import problems
from deployments.admission import Admission
from deployments.answers import Answer, JobAnswer, answer, job_answer, picture, wants_picture
from deployments.body import read_request
from deployments.service import Service, caller, lasting, prompt_answer, waited
from pipeline.errors import Cancelled, DeadlineExceeded, InvalidRequest
from pipeline.request import Request
from pipeline.settings import JobSettings, LimitSettings

MAX_KEY = 255  # characters of an Idempotency-Key


@dataclass(frozen=True, slots=True)
class Preference:
    """How a caller wants to be answered (RFC 7240).

    wait: seconds; None: until the end. asynchronous: whether it may be answered before the end at all.
    """

    asynchronous: bool = False
    wait: float | None = None

    @classmethod
    def parse(cls, header: str, longest: float) -> Self:
        """From the Prefer header; what is unknown or malformed is ignored, as the RFC asks."""
        found = [part.strip().lower().partition("=") for part in header.replace(";", ",").split(",")]
        seconds = [value.strip().strip('"') for name, _, value in found if name.strip() == "wait"]
        if seconds and seconds[0].isdecimal() and len(seconds[0]) < 10:
            return cls(True, min(float(seconds[0]), longest))
        if any(name.strip() == "respond-async" for name, _, _ in found):
            return cls(True, 0.0)
        return cls()

    @property
    def applied(self) -> str:
        """For the header Preference-Applied."""
        return "respond-async" if not self.wait else f"respond-async, wait={self.wait:g}"


def idempotency_key(headers: Mapping[str, str]) -> str | None:
    """The Idempotency-Key, if there is one; raises InvalidRequest for what cannot be one."""
    key = headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isascii() and key.isprintable()):
        raise InvalidRequest(f"The Idempotency-Key has to be 1 to {MAX_KEY} visible characters, a UUID say.")
    return key


@asynccontextmanager
async def in_time(limits: LimitSettings) -> AsyncIterator[asyncio.Timeout]:
    """What a request may take in all; raises DeadlineExceeded, or Cancelled where its body does not arrive."""
    try:
        async with asyncio.timeout(limits.request_seconds) as clock:
            yield clock
    except TimeoutError as error:
        if not clock.expired():
            raise
        raise DeadlineExceeded("It took longer than it may; try later, or with fewer steps or pixels.") from error
    except ClientDisconnect as error:
        raise Cancelled("The request was cancelled; its body did not arrive.") from error


class Maker:
    """Requests become images or jobs."""

    def __init__(self, service: Service, admission: Admission, limits: LimitSettings, jobs: JobSettings) -> None:
        self._service, self._admission, self._limits, self._jobs = service, admission, limits, jobs

    async def make(self, http: fastapi.Request) -> Response:
        """One POST /v1/images."""
        started = time.perf_counter()
        preference = Preference.parse(http.headers.get("prefer", ""), self._jobs.wait_seconds)
        key = idempotency_key(http.headers)
        seconds = preference.wait if preference.asynchronous else self._limits.request_seconds
        with ExitStack() as place:
            async with in_time(self._limits) as clock:
                with self._admission.admitted(caller(http)):
                    request = await read_request(http.headers, http.stream(), self._limits.max_body_bytes)
                    if not (preference.asynchronous or lasting(request, key)):
                        return await self._image(http, request, clock, started)
                    if seconds:
                        place.enter_context(self._admission.waiting(caller(http)))
                    tenant = caller(http).tenant
                    view, replayed = await self._service.jobs.submit(request, tenant, key)
            if seconds:
                view = await waited(self._service.jobs, tenant, view, seconds, lasting(request, key))
        response = await self._answered(http, view, preference, key)
        if replayed:
            response.headers["Idempotency-Replayed"] = "true"
        return response

    async def _image(self, http: fastapi.Request, request: Request, clock: asyncio.Timeout, started: float) -> Response:
        if request.deadline_seconds is not None:
            early = self._limits.request_seconds - request.deadline_seconds
            clock.reschedule((clock.when() or 0.0) - max(0.0, early))
        tenant = caller(http).tenant
        stored = await self._service.generate(request, tenant)
        if not wants_picture(http.headers.get("accept", "")):
            return JSONResponse(answer(stored, time.perf_counter() - started))
        return await self._pixels(stored.id, tenant)

    async def _answered(
        self, http: fastapi.Request, view: dict[str, Any], preference: Preference, key: str | None
    ) -> Response:
        if view["status"] == "succeeded":
            if wants_picture(http.headers.get("accept", "")):
                return await self._pixels(view["id"], caller(http).tenant)
            return JSONResponse(job_answer(view))
        if view["status"] == "failed":
            return JSONResponse(view["error"], view["error"]["status"], media_type=problems.MEDIA_TYPE)
        if view["status"] == "cancelled":
            raise Cancelled("The job was cancelled; send its request again under a new Idempotency-Key.")
        headers = {"Location": view["record"], "Retry-After": "1"}
        if preference.asynchronous:
            headers["Preference-Applied"] = preference.applied
        elif key is not None:  # without one there is a webhook, and nothing else by which to learn of the job
            raise DeadlineExceeded("The job goes on; send the same request with the same Idempotency-Key to wait on.")
        return JSONResponse(view, 202, headers)

    async def _pixels(self, image_id: str, tenant: str) -> Response:
        response = picture(
            await prompt_answer(self._service.content(image_id, 0, tenant), "The store"), 303, "no-store"
        )
        address = f"/v1/images/{image_id}"
        response.headers.update({"Content-Location": f"{address}/0", "Link": f'<{address}>; rel="describedby"'})
        return response


def router(maker: Maker) -> fastapi.APIRouter:
    """The route that makes pictures."""
    routes = fastapi.APIRouter()
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Request"}}}}
    accepted = {"description": "a job: the request is in the store, and goes on", "model": JobAnswer}

    @routes.post(
        "/v1/images",
        response_model=Answer,
        responses={202: accepted, **problems.documented(*problems.leaves())},
        openapi_extra={"requestBody": body},
    )
    async def make(http: fastapi.Request) -> Response:
        """Make pictures, and wait for them. With `Accept: image/*` the answer is the first of them itself.

        With `Prefer: respond-async` the answer is a job, which goes on whatever becomes of its caller; with `wait=N` it
        is one where that was too short, and closing the connection stops it unless a key or a webhook names it.
        With an Idempotency-Key the same request is carried out once, however often it is sent.
        """
        return await maker.make(http)

    return routes
