"""Replicate's API: programs written for the model flux-pulid work here with another base address.

POST /v1/predictions, /v1/models/{owner}/{name}/predictions   a job
GET  /v1/predictions/{id}, POST /v1/predictions/{id}/cancel   what has become of it; stop it
GET  /v1/predictions/{id}/stream, .../output/{n}.{ending}     its events; its pictures
GET  /v1/models/{owner}/{name}, and its versions              the model
GET  /v1/webhooks/default/secret                              by which to check webhooks

It is another way to say a Request and to be told of its job: everything else is as for POST /v1/images. Its errors are
problems (RFC 9457) in their own right.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import nullcontext

import fastapi
from fastapi.responses import JSONResponse, Response

from deployments import problems
from deployments.addresses import base_url
from deployments.admission import Admission
from deployments.answers import picture
from deployments.body import read
from deployments.jobs_api import STORE, EventStream
from deployments.making import idempotency_key, in_time
from deployments.replicate_body import Create, Reference, body_schema, echo, named, reference, request
from deployments.replicate_files import with_files
from deployments.replicate_view import (
    PREDICTIONS,
    bar,
    created,
    model,
    origin,
    outputs,
    page,
    prediction,
    version,
)
from deployments.service import Service, caller, lasting, prompt_answer, waited
from pipeline.errors import ImageNotFound, Overloaded, StoreUnavailable, WebhookRefused
from pipeline.jobs import ENDS
from pipeline.photos import media_type
from pipeline.progress import Position, ServerEvent
from pipeline.settings import Settings
from pipeline.stored import Content
from pipeline.webhooks import read_secret, tenant_secret

MODELS = "/v1/models/{owner}/{name}"
LONGEST_WAIT = 60.0  # seconds, Replicate's own bound
WAIT = re.compile(r'(?:^|[,;\s])wait(?:="?([0-9]{1,9})"?)?(?=$|[,;\s])', re.IGNORECASE)
PICTURE = re.compile(r"([0-9])\.(?:png|jpg|webp)")


def wait_seconds(prefer: str, longest: float) -> float:
    """For how long an answer is held, by the header Prefer: `wait`, `wait=N` or nothing of it."""
    found = WAIT.search(prefer)
    longest = min(longest, LONGEST_WAIT)
    return 0.0 if found is None else min(longest, float(found[1] or LONGEST_WAIT))


class Predictions:
    """Jobs as predictions."""

    def __init__(self, service: Service, admission: Admission, settings: Settings) -> None:
        self._service, self._admission = service, admission
        self._limits, self._longest = settings.limits, settings.jobs.wait_seconds

    async def create(self, http: fastapi.Request, model: str | None = None) -> Response:
        """One POST; `model` is OWNER/NAME where the address names it."""
        wait, base = wait_seconds(http.headers.get("prefer", ""), self._longest), base_url(http)
        key = idempotency_key(http.headers)
        with self._admission.waiting(caller(http)) if wait else nullcontext():
            async with in_time(self._limits):
                with self._admission.admitted(caller(http)):
                    most = self._limits.max_body_bytes
                    body = await read(Create, http.headers, http.stream(), most)
                    meant = reference(body) if model is None else Reference(model)
                    given = {name: value for name, value in body.input.items() if value is not None}
                    tenant = caller(http).tenant
                    whole = await with_files(body.input, base, most, lambda file_id: self._file(file_id, tenant))
                    asked = await asyncio.to_thread(request, body.model_copy(update={"input": whole}))
                    came = origin(base, meant.model, meant.version, echo(given))
                    with named(given):
                        view, replayed = await self._service.jobs.submit(asked, tenant, key, came)
            if wait:
                view = await waited(self._service.jobs, tenant, view, wait, lasting(asked, key))
        headers = {"Idempotency-Replayed": "true"} if replayed else {}
        status = 202 if wait and view["status"] not in ENDS else 201
        return JSONResponse(created(view, base), status, headers)

    async def view(self, http: fastapi.Request, prediction_id: str) -> Response:
        """A prediction."""
        view = await prompt_answer(self._service.jobs.view(caller(http).tenant, prediction_id), STORE)
        return JSONResponse(prediction(view, base_url(http)))

    async def cancel(self, http: fastapi.Request, prediction_id: str) -> Response:
        """Stop one; what has ended stays as it is."""
        view = await prompt_answer(self._service.jobs.cancel(caller(http).tenant, prediction_id), STORE)
        return JSONResponse(prediction(view, base_url(http)))

    async def stream(self, http: fastapi.Request, prediction_id: str) -> Response:
        """Its events."""
        tenant, after = caller(http).tenant, Position.parse(http.headers.get("last-event-id", ""))
        await prompt_answer(self._service.jobs.view(tenant, prediction_id), STORE)
        events = self._service.jobs.follow(tenant, prediction_id, after)
        return EventStream(_as_text(events, base_url(http)), self._admission.waiting(caller(http)))

    async def output(self, http: fastapi.Request, prediction_id: str, name: str) -> Response:
        """The pixels of a picture, themselves: SDKs follow no redirect, and would take their key along."""
        found = PICTURE.fullmatch(name)
        if found is None:
            raise ImageNotFound("There is no such picture; check its address.")
        data = await prompt_answer(self._service.data(prediction_id, int(found[1]), caller(http).tenant), STORE)
        content = Content(media_type(data) or "application/octet-stream", data)
        return picture(content, 307, "private, max-age=86400, immutable")

    async def _file(self, file_id: str, tenant: str) -> bytes:
        return await prompt_answer(asyncio.to_thread(self._service.uploads.data, file_id, tenant), STORE)


def router(service: Service, admission: Admission, settings: Settings) -> fastapi.APIRouter:
    """The routes of predictions, of the model and of webhooks."""
    routes = fastapi.APIRouter()
    _predictions(routes, Predictions(service, admission, settings))
    _models(routes)

    @routes.get("/v1/webhooks/default/secret", responses=problems.documented(WebhookRefused))
    async def secret(http: fastapi.Request) -> Response:
        """By which the caller's webhooks are signed."""
        key = tenant_secret(await asyncio.to_thread(read_secret, settings.webhooks), caller(http).tenant)
        return JSONResponse({"key": key}, headers={"Cache-Control": "no-store"})

    return routes


def _predictions(routes: fastapi.APIRouter, predictions: Predictions) -> None:
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": body_schema()}}}}
    made = problems.documented(*problems.leaves())
    missing = problems.documented(ImageNotFound, StoreUnavailable)

    @routes.post(PREDICTIONS, status_code=201, responses=made, openapi_extra=body)
    async def create(http: fastapi.Request) -> Response:
        """Replicate's `predictions.create`: a job; with `Prefer: wait` the answer waits for its end, or a minute."""
        return await predictions.create(http)

    @routes.post(f"{MODELS}/predictions", status_code=201, responses=made, openapi_extra=body)
    async def create_of_model(http: fastapi.Request, owner: str, name: str) -> Response:
        """The same, for a model that is named by the address."""
        if (refused := _unknown(owner, name)) is not None:
            return refused
        return await predictions.create(http, f"{owner}/{name}")

    @routes.get(f"{PREDICTIONS}/{{prediction_id}}", responses=missing)
    async def view(http: fastapi.Request, prediction_id: str) -> Response:
        """A job as a prediction, by whichever API it came."""
        return await predictions.view(http, prediction_id)

    @routes.post(f"{PREDICTIONS}/{{prediction_id}}/cancel", responses=missing)
    async def cancel(http: fastapi.Request, prediction_id: str) -> Response:
        """Stop a prediction; one that has ended stays as it is."""
        return await predictions.cancel(http, prediction_id)

    @routes.get(f"{PREDICTIONS}/{{prediction_id}}/stream", responses={**missing, **problems.documented(Overloaded)})
    async def stream(http: fastapi.Request, prediction_id: str) -> Response:
        """What happens to a prediction, as server-sent events: logs, output, then error or done."""
        return await predictions.stream(http, prediction_id)

    @routes.get(f"{PREDICTIONS}/{{prediction_id}}/output/{{name}}", responses=missing)
    async def output(http: fastapi.Request, prediction_id: str, name: str) -> Response:
        """The pixels of a picture."""
        return await predictions.output(http, prediction_id, name)


def _models(routes: fastapi.APIRouter) -> None:
    @routes.get(MODELS)
    async def one(http: fastapi.Request, owner: str, name: str) -> Response:
        """The model that is served; its owner is whom the caller says."""
        return _unknown(owner, name) or JSONResponse(model(owner, base_url(http)))

    @routes.get(f"{MODELS}/versions")
    async def versions(owner: str, name: str) -> Response:
        """Its versions: there is one."""
        return _unknown(owner, name) or JSONResponse(page([version(Reference().version)]))

    @routes.get(f"{MODELS}/versions/{{version_id}}")
    async def one_version(owner: str, name: str, version_id: str) -> Response:
        """A version: its input and output."""
        known = Reference.parse(version_id) is not None and "/" not in version_id
        return _unknown(owner, name if known else "") or JSONResponse(version(version_id))


def _unknown(owner: str, name: str) -> Response | None:
    """The refusal of a model that is not served here; None for the one that is."""
    if Reference.parse(f"{owner}/{name}") is not None:
        return None
    return problems.response(ImageNotFound("There is no such model here; name OWNER/flux-pulid."), 1)


async def _as_text(events: AsyncIterator[ServerEvent | None], base: str) -> AsyncIterator[str]:
    """Events as Replicate names them. Who comes back after the first of several outputs gets all of them again."""
    async for event in events:
        if event is None:
            yield ": keep-alive\n\n"
            continue
        before = event.at._replace(number=max(0, event.at.number - 1))
        if event.name == "step":
            yield _event(event.at, "logs", bar(event.data["step"], event.data["steps"]))
        elif event.name == "succeeded":
            for address in outputs(event.data, base):
                yield _event(before, "output", address)
            yield _event(event.at, "done", "{}")
        elif event.name == "failed":
            yield _event(event.at, "error", prediction(event.data, base)["error"])
        elif event.ends:
            yield _event(event.at, "done", json.dumps({"reason": "canceled"}))


def _event(at: Position, name: str, data: str) -> str:
    return f"id: {at}\nevent: {name}\ndata: {data}\n\n"
