"""The routes of a job: what it is, what happens to it, stopping and erasing it."""

import json
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager

import fastapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.admission import Admission
from deployments.answers import JobAnswer, picture
from deployments.problems import documented
from deployments.service import Service, caller, prompt_answer
from pipeline.errors import ImageNotFound, Overloaded, StoreUnavailable
from pipeline.progress import Position, ServerEvent

STORE = "The store"
STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies must not gather events


class EventStream(StreamingResponse):
    """Server-sent events, for which a place is taken before the answer begins."""

    def __init__(self, events: AsyncIterator[str], place: AbstractContextManager[None]) -> None:
        super().__init__(events, 200, STREAM, "text/event-stream")
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI protocol; raises what taking the place does."""
        with self._place:
            await super().__call__(scope, receive, send)


def router(service: Service, admission: Admission) -> fastapi.APIRouter:
    """The routes below /v1/images/{id}."""
    routes = fastapi.APIRouter()
    errors = documented(ImageNotFound, StoreUnavailable)
    streamed = {200: {"content": {"text/event-stream": {}}}, **documented(ImageNotFound, Overloaded, StoreUnavailable)}

    @routes.get("/v1/images/{image_id}", response_model=JobAnswer, responses=errors)
    async def view(http: fastapi.Request, image_id: str) -> Response:
        """A job, open or ended, and once there are pictures how they came about: the request without its photos,
        seeds, models, faces, timings.
        """
        return JSONResponse(await prompt_answer(service.jobs.view(caller(http).tenant, image_id), STORE))

    @routes.get("/v1/images/{image_id}/events", responses=streamed)
    async def events(http: fastapi.Request, image_id: str) -> Response:
        """What happens to a job, as server-sent events; after Last-Event-ID where a client comes back."""
        after = Position.parse(http.headers.get("last-event-id", ""))
        tenant = caller(http).tenant
        await prompt_answer(service.jobs.view(tenant, image_id), STORE)  # or the answer would begin before its 404
        stream = as_text(service.jobs.follow(tenant, image_id, after))
        return EventStream(stream, admission.waiting(caller(http)))

    @routes.post("/v1/images/{image_id}/cancel", response_model=JobAnswer, responses=errors)
    async def cancel(http: fastapi.Request, image_id: str) -> Response:
        """Stop a job; one that has ended stays as it is."""
        return JSONResponse(await prompt_answer(service.jobs.cancel(caller(http).tenant, image_id), STORE))

    @routes.delete("/v1/images/{image_id}", status_code=204, responses=errors)
    async def erase(http: fastapi.Request, image_id: str) -> Response:
        """Erase a job or an image: its photos, its pictures and its record. What is running is stopped."""
        await prompt_answer(service.jobs.erase(caller(http).tenant, image_id), STORE)
        return Response(status_code=204)

    @routes.get("/v1/images/{image_id}/{number}", responses={307: {"description": "where the pixels are"}, **errors})
    async def pixels(http: fastapi.Request, image_id: str, number: str) -> Response:
        """The pixels of a picture, or a redirect to them."""
        if not (number.isdecimal() and number.isascii() and len(number) < 3):
            raise ImageNotFound("There is no such image; check its id and number.")
        content = await prompt_answer(service.content(image_id, int(number), caller(http).tenant), STORE)
        return picture(content, 307, "private, max-age=86400, immutable")

    return routes


async def as_text(events: AsyncIterator[ServerEvent | None]) -> AsyncIterator[str]:
    """Events as a stream of text/event-stream."""
    async for event in events:
        if event is None:
            yield ": keep-alive\n\n"
        else:
            data = json.dumps(event.data, ensure_ascii=False)
            yield f"id: {event.at}\nevent: {event.name}\ndata: {data}\n\n"
