"""OpenAI's Images API: programs written for it work here with another base address.

POST /v1/images/generations   pictures of a prompt, of a stored identity too
POST /v1/images/edits         pictures of the person in the photos that are sent

It is another way to say a Request and to be told of its pictures: everything else is as for POST /v1/images.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments.addresses import base_url
from deployments.admission import Admission
from deployments.job_view import images
from deployments.jobs_api import STORE, STREAM
from deployments.making import in_time
from deployments.openai_body import Asked, body_schema, read_edit, read_generation
from deployments.openai_errors import EDITS, GENERATIONS, documented, told
from deployments.service import Progress, Service, caller, prompt_answer
from pipeline.errors import PipelineError
from pipeline.events import Event, Previewed, Queued, Stepped
from pipeline.picture import encode, enlarged
from pipeline.request import Request
from pipeline.settings import LimitSettings
from pipeline.stored import Stored

IDENTITY_TOKENS = 32  # that the identity encoder makes of a face
KEEP_ALIVE_SECONDS = 10.0  # after which an event stream says that it is still there
Read = Callable[..., Awaitable[Asked]]


class Previews:
    """Which previews of a picture are sent: so many at most, spread evenly over its steps."""

    def __init__(self, most: int) -> None:
        self._left = [(number + 1) / (most + 1) for number in range(most)]
        self._done = 0.0

    def wants(self, event: Event) -> bool:
        """Whether this one is sent; told of every event of the picture, in order."""
        if isinstance(event, Stepped):
            self._done = event.done / event.total
        if not isinstance(event, Previewed) or not self._left or self._done < self._left[0]:
            return False
        self._left.pop(0)
        return True


class Images:
    """Both routes over a service; `model` is the name of what it serves."""

    def __init__(self, service: Service, admission: Admission, limits: LimitSettings, model: str) -> None:
        self._service, self._admission, self._limits, self._model = service, admission, limits, model

    async def make(self, http: fastapi.Request, read: Read, kind: str) -> Response:
        """One request; `kind` begins the names of its events."""
        with ExitStack() as place:
            async with in_time(self._limits):
                place.enter_context(self._admission.admitted(caller(http)))
                asked = await read(http.headers, http.stream(), self._limits.max_body_bytes, self._model)
                if not asked.body.stream:
                    stored = await self._service.generate(asked.request, caller(http).tenant)
                    return await self._answer(http, asked, stored)
            events = self._events(asked, caller(http).tenant, kind, place.pop_all())
            first = await anext(events)  # what fails before there is anything to tell has a status of its own
            return StreamingResponse(_to_the_end(first, events), 200, STREAM, "text/event-stream")

    async def _answer(self, http: fastapi.Request, asked: Asked, stored: Stored) -> Response:
        numbers = range(len(stored.record["pictures"]))
        if asked.body.as_url:
            data = [{"url": url} for url in _addresses(http, stored)]
        else:
            tenant = caller(http).tenant
            data = [{"b64_json": await self._base64(stored, number, tenant)} for number in numbers]
        answer = {"created": int(time.time()), "data": data, **asked.look, "usage": usage(asked.request, stored)}
        return JSONResponse(answer, headers={"Link": f'</v1/images/{stored.id}>; rel="describedby"'})

    async def _events(self, asked: Asked, tenant: str, kind: str, place: ExitStack) -> AsyncGenerator[str]:
        """Partial images, then every picture. Raises PipelineError; closing it stops the work, and leaves `place`."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()  # None: the work has ended
        previews, partials = Previews(asked.body.partial_images), 0

        def progress(number: int, event: Event) -> None:
            if number == 0 and (isinstance(event, Queued) or previews.wants(event)):
                queue.put_nowait(event)

        with place:
            work = asyncio.ensure_future(self._draw(asked, tenant, progress if asked.body.partial_images else None))
            work.add_done_callback(lambda _: queue.put_nowait(None))
            try:
                async for event in _until_none(queue):
                    if not isinstance(event, Previewed):  # the photos are read, or nothing has come for a while
                        yield ": keep-alive\n\n"
                        continue
                    data = await asyncio.to_thread(_partial, event, asked)
                    yield _event(f"{kind}.partial_image", asked, b64_json=data, partial_image_index=partials)
                    partials += 1
                stored = await work
            finally:
                work.cancel()
            for number in range(len(stored.record["pictures"])):
                data = await self._base64(stored, number, tenant)
                used = usage(asked.request, stored, 1)
                yield _event(f"{kind}.completed", asked, b64_json=data, usage=used)

    async def _draw(self, asked: Asked, tenant: str, progress: Progress | None) -> Stored:
        async with in_time(self._limits):
            return await self._service.generate(asked.request, tenant, progress)

    async def _base64(self, stored: Stored, number: int, tenant: str) -> str:
        return base64.b64encode(await prompt_answer(self._service.data(stored.id, number, tenant), STORE)).decode()


async def _until_none(queue: asyncio.Queue[Event | None]) -> AsyncGenerator[Event | None]:
    """What is put into a queue until None is; None is given where nothing comes for a while."""
    while True:
        try:
            async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                found = await queue.get()
        except TimeoutError:
            yield None
            continue
        if found is None:
            return
        yield found


async def _to_the_end(first: str, events: AsyncGenerator[str]) -> AsyncGenerator[str]:
    """A stream that has begun; what fails now is its last event."""
    async with aclosing(events):
        yield first
        try:
            async for event in events:
                yield event
        except PipelineError as error:
            yield f"event: error\ndata: {json.dumps({'type': 'error', **told(error)})}\n\n"


def _event(name: str, asked: Asked, **data: Any) -> str:
    values = {"type": name, "created_at": int(time.time()), **asked.look, **data}
    return f"event: {name}\ndata: {json.dumps(values)}\n\n"


def _partial(preview: Previewed, asked: Asked) -> str:
    """A preview in the size and format of the picture, as base64."""
    request = asked.request
    pixels = enlarged(preview.pixels, request.width, request.height)
    return base64.b64encode(encode(pixels, request.output_format, request.output_quality)).decode()


def _addresses(http: fastapi.Request, stored: Stored) -> list[str]:
    """Where the pictures are: the store's own links, or addresses of this service by the name that the caller used."""
    if stored.urls and all(url.startswith(("https://", "http://")) for url in stored.urls):
        return list(stored.urls)
    return [f"{base_url(http)}{image['url']}" for image in images(stored.record)]


def usage(request: Request, stored: Stored, pictures: int | None = None) -> dict[str, Any]:
    """The tokens that FLUX read and drew: text as it was padded, an identity's of each face, 16 x 16 pixels each."""
    text = request.max_sequence_length
    faces = IDENTITY_TOKENS * sum(len(person) for person in stored.record["faces"])
    count = len(stored.record["pictures"]) if pictures is None else pictures
    drawn = count * (request.width // 16) * (request.height // 16)
    return {
        "input_tokens": text + faces,
        "input_tokens_details": {"text_tokens": text, "image_tokens": faces},
        "output_tokens": drawn,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        "total_tokens": text + faces + drawn,
    }


def router(pictures: Images) -> fastapi.APIRouter:
    """The two routes."""
    routes = fastapi.APIRouter(responses=documented())

    @routes.post(GENERATIONS, openapi_extra=_body("application/json", edit=False))
    async def generations(http: fastapi.Request) -> Response:
        """OpenAI's `images.generate`: pictures of a prompt, with a stored identity if one is named."""
        return await pictures.make(http, read_generation, "image_generation")

    @routes.post(EDITS, openapi_extra=_body("multipart/form-data", edit=True))
    async def edits(http: fastapi.Request) -> Response:
        """OpenAI's `images.edit`: new pictures of the person whom the photos show."""
        return await pictures.make(http, read_edit, "image_edit")

    return routes


def _body(media_type: str, edit: bool) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": body_schema(edit)}}}}
