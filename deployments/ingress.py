"""Ingress: the HTTP API over the other deployments. It holds promises, awaits once, and stores the pictures."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from deployments.api import create_api
from deployments.problems import unforeseen
from pipeline.errors import ImageNotFound, Overloaded, PipelineError, WorkerUnavailable
from pipeline.events import Event, last
from pipeline.flow import Stages, chain, new_image_id
from pipeline.presets import PRESETS
from pipeline.request import Request
from pipeline.settings import Settings
from pipeline.store import Content, Store, Stored, open_store

Handle = DeploymentHandle[Any]
Response = DeploymentResponse[Any] | DeploymentResponseGenerator[Any]
Progress = Callable[[int, Event], None]


class Ingress:
    """The service behind the API. Nothing of a request is kept here."""

    def __init__(
        self, settings: Settings, handles: Mapping[str, Handle], store: Callable[[Settings], Store] | None = None
    ) -> None:
        """`handles` by the names of the deployments."""
        self._settings = settings
        self._handles = dict(handles)
        self._watching = self._handles["FluxDenoiser"].options(stream=True).watch
        self._store = open_store(settings.store) if store is None else store(settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve calls for the HTTP application of a replica."""
        return create_api(self, self._settings.limits)

    async def generate(self, request: Request, progress: Progress | None = None) -> Stored:
        """See deployments.api.Service. When it fails or is cancelled, everything that it started is stopped.

        `progress(number, event)` is told what happens to picture `number`, all but its end.
        """
        request = request.with_seed()
        started: list[Response] = []
        try:
            promises = chain(request, self._stages(started, watching=progress is not None))
            pictures = await asyncio.gather(
                *(promises if progress is None else (last(p, partial(progress, n)) for n, p in enumerate(promises)))
            )
        except BaseException as error:
            for response in started:
                with suppress(Exception):  # one that failed before it reached a replica raises its error here again
                    response.cancel()  # type: ignore[no-untyped-call]
            if isinstance(error, Exception):
                raise told(error) from None  # Ray's own text would bring a remote traceback along
            raise
        return await asyncio.to_thread(self._store.save, new_image_id(), request, pictures)

    def _stages(self, started: list[Response], watching: bool) -> Stages:
        def remote(handle: Any) -> Callable[..., Response]:
            def call(*arguments: Any) -> Response:
                started.append(handle.remote(*arguments))
                return started[-1]

            return call

        return Stages(
            faces=remote(self._handles["FaceDetector"].detect),
            identity=remote(self._handles["IdentityEncoder"].encode),
            text=remote(self._handles["TextEncoder"].encode),
            denoise=remote(self._watching if watching else self._handles["FluxDenoiser"].denoise),
        )

    async def record(self, image_id: str) -> Mapping[str, Any]:
        """See deployments.api.Service."""
        return await asyncio.to_thread(self._store.record, image_id)

    async def content(self, image_id: str, number: int) -> Content:
        """See deployments.api.Service."""
        return await asyncio.to_thread(self._store.content, image_id, number)

    async def health(self) -> Mapping[str, Any]:
        """See deployments.api.Service. The store is asked for an image that is not there."""
        try:
            running = await asyncio.to_thread(running_replicas)
        except (RayError, KeyError) as error:  # no controller, or one that has just started
            raise WorkerUnavailable("Ray's controller does not answer; try again.") from error
        missing = [name for name in self._handles if running.get(name, 0) == 0]
        if missing:
            raise WorkerUnavailable(f"No {' and no '.join(missing)} is running yet; models may be loading. Try again.")
        with suppress(ImageNotFound):
            await asyncio.to_thread(self._store.record, "0" * 32)
        return {"status": "ok", "replicas": running}

    def models(self) -> Mapping[str, Any]:
        """See deployments.api.Service."""
        preset = PRESETS[self._settings.preset]
        return {
            "preset": preset.name,
            "description": preset.description,
            "models": [
                {"role": spec.role, "repository": spec.repository, "licence": asdict(spec.licence)}
                for spec in preset.specs
            ],
            "commercial_use": all(spec.licence.commercial for spec in preset.specs),
        }


def running_replicas() -> dict[str, int]:
    """How many replicas of each deployment can take requests now; one call to Serve's controller."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    return {
        name: sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")
        for name, deployment in application.deployments.items()
    }


def told(error: BaseException) -> PipelineError:
    """What a failure of a remote call means for the caller.

    An error arrives wrapped once for each replica that it crossed, and only its innermost cause has its own words.
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, RayTaskError):
            inner = inner.cause
        elif isinstance(inner, PipelineError):
            return inner
        elif isinstance(inner, BackPressureError):
            return Overloaded("The service has all the work it can queue; try again after the time in Retry-After.")
        elif isinstance(inner, RayError | DeploymentUnavailableError | ReplicaUnavailableError):
            return WorkerUnavailable("A worker was lost or is not there yet; send the request again.")
        else:
            inner = inner.__cause__
    return unforeseen(error, "Ingress")
