"""The HTTP API, as a function of what it needs: no Ray and no model in here.

POST   /v1/images               pictures of a person, or a job that makes them
GET    /v1/images/{id}          a job or an image, and how it came about
GET    /v1/images/{id}/{n}      its pixels
GET    /v1/images/{id}/events   what happens to it
POST   /v1/images/{id}/cancel   stop it
DELETE /v1/images/{id}          erase it
       /v1/identities           people who are stored
POST   /v1/images/generations   OpenAI's Images API, and /v1/images/edits
POST   /v1/predictions          Replicate's API, and what belongs to it below /v1/models, /v1/files and /v1/webhooks
GET    /v1/models               which models, under which licences
GET    /healthz                 whether pictures can be made now
GET    /docs                    all of this, to be tried out
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import fastapi
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from deployments import (
    about,
    identities_api,
    jobs_api,
    making,
    openai_api,
    openai_errors,
    openapi,
    problems,
    replicate_api,
    replicate_files,
)
from deployments.admission import Admission
from deployments.hosts import OwnHost
from deployments.keys import Authenticate, open_keys
from deployments.limits import Limits
from deployments.service import Service
from pipeline.errors import PipelineError
from pipeline.settings import Settings

DESCRIPTION = "A face photo and a prompt become a picture of that person."
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_api(service: Service, settings: Settings, lifespan: Lifespan | None = None) -> FastAPI:
    """The API of a service. Every failure is told as the API that was called tells it. Raises SettingsInvalid."""
    app = FastAPI(
        title="PuLID Serve",
        version="1",
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        generate_unique_id_function=openapi.operation_id,
    )
    limits, retry_after = Limits(), settings.limits.retry_after_seconds
    admission = Admission(settings.limits.max_requests, limits, service.jobs.open_jobs)
    maker = making.Maker(service, admission, settings.limits, settings.jobs)
    for router in (
        making.router(maker),
        jobs_api.router(service, admission),
        identities_api.router(service.identities, admission, settings.limits),
        openai_api.router(openai_api.Images(service, admission, settings.limits, settings.preset)),
        replicate_api.router(service, admission, settings),
        replicate_files.router(service, admission, settings.limits),
        about.router(service),
    ):
        app.include_router(router)

    def refusal(scope: Scope, error: PipelineError) -> Response:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if openai_errors.speaks(path):
            return openai_errors.refusal(error, retry_after)
        return problems.response(error, retry_after)

    keys = open_keys(settings.keys)
    app.add_middleware(Authenticate, keys=keys, spend=limits.spend, refusal=refusal)
    if keys is None:
        app.add_middleware(OwnHost, refusal=refusal)
    app.add_middleware(problems.LastResort, refusal=refusal)

    @app.exception_handler(PipelineError)
    async def _failed(http: fastapi.Request, error: PipelineError) -> Response:
        return refusal(http.scope, error)

    @app.exception_handler(HTTPException)
    async def _no_route(_: fastapi.Request, error: HTTPException) -> Response:
        return problems.http_response(error.status_code, dict(error.headers or {}))

    openapi.extend(app, keys_needed=settings.keys.file is not None)
    return app
