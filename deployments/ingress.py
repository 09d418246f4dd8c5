"""Ingress: the HTTP API over the other deployments. It holds promises, awaits once, and stores the pictures."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from deployments.about import listing
from deployments.api import create_api
from deployments.housekeeping import Housekeeping
from deployments.identities import Identities
from deployments.jobs import Jobs
from deployments.keys import check_exposure
from deployments.outbox import Outbox
from deployments.proxy import http_host
from deployments.remote import Remote, RemoteBoard, running_replicas
from deployments.runner import Runner
from deployments.service import Progress
from deployments.worker import Worker
from pipeline.errors import ImageNotFound, WorkerUnavailable
from pipeline.events import last
from pipeline.flow import chain, stored_people
from pipeline.identities import IdentityStore, models_in_use
from pipeline.job_store import JobStore
from pipeline.jobs import new_id
from pipeline.picture import Picture
from pipeline.presets import PRESETS
from pipeline.request import Request
from pipeline.settings import Settings
from pipeline.store import Content, ImageStore, Stored, open_objects
from pipeline.uploads import UploadStore
from pipeline.webhooks import Webhooks

STORE_THREADS = 64
Handle = DeploymentHandle[Any]
Open = Callable[[Settings], Any]


class Ingress:
    """The service behind the API. Nothing of a request is kept here."""

    def __init__(
        self,
        settings: Settings,
        handles: Mapping[str, Handle],
        board: Handle,
        objects: Open = lambda settings: open_objects(settings.store),
        models: Open = models_in_use,
    ) -> None:
        """`handles` by the names of the deployments; `models`: the hashes of the model files that make an identity.

        Raises SettingsInvalid where anybody could use the service.
        """
        check_exposure(settings, http_host())
        self._settings = settings
        self._remote = Remote(handles)
        store = objects(settings)
        self._images = ImageStore(store)
        jobs, telling = JobStore(store, self._images, settings.jobs), RemoteBoard(board)
        self._webhooks = Webhooks(settings.webhooks)
        outbox = Outbox(jobs, self._webhooks)
        worker = Worker(jobs, self._images, self._make, telling, outbox, settings.jobs)
        self._runner = Runner(jobs, worker, telling, settings.jobs)
        self.jobs = Jobs(jobs, self._runner, telling, outbox, settings.jobs, self._check)
        identities = IdentityStore(store, settings.identities, partial(models, settings))
        self.identities = Identities(identities, self._remote)
        self.uploads = UploadStore(store, settings.photos.max_bytes)
        self._housekeeping = Housekeeping(jobs.sweep, identities.sweep, self.uploads.sweep)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve calls for the HTTP application of a replica."""
        return create_api(self, self._settings, self._life)

    @asynccontextmanager
    async def _life(self, _: FastAPI) -> AsyncIterator[None]:
        """Jobs are run while the replica lives; when it is told to end, others go on with them."""
        # Every call of the store takes a thread, and may wait long for a store that is away.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(STORE_THREADS))
        self._runner.start(uuid.uuid4().hex)
        self._housekeeping.start()
        try:
            yield
        finally:
            await self._housekeeping.close()
            await self._runner.close()

    async def generate(self, request: Request, tenant: str = "", progress: Progress | None = None) -> Stored:
        """See deployments.service.Service. When it fails or is cancelled, everything that it started is stopped."""
        request = request.with_seed()
        seconds = min(request.deadline_seconds or float("inf"), self._settings.limits.request_seconds)
        pictures = await self._make(request, tenant, time.time() + seconds, progress)
        return await asyncio.to_thread(self._images.save, new_id(), request, pictures, tenant)

    async def _make(
        self, request: Request, tenant: str, expires: float, progress: Progress | None = None
    ) -> list[Picture]:
        """The pictures of a request. `progress(number, event)` hears of picture `number`, up to its end."""
        stored = await self.identities.named(request, tenant)
        with self._remote.calls(stored, watching=progress is not None) as stages:
            promises = chain(request, stages, tenant, expires)
            if progress is None:
                return list(await asyncio.gather(*promises))
            watched = (last(promise, partial(progress, number)) for number, promise in enumerate(promises))
            return list(await asyncio.gather(*watched))

    async def _check(self, request: Request, tenant: str) -> None:
        if request.webhook is not None:
            self._webhooks.check(request.webhook)
        stored_people(request, await self.identities.named(request, tenant), tenant)

    async def content(self, image_id: str, number: int, tenant: str = "") -> Content:
        """See deployments.service.Service."""
        return await asyncio.to_thread(self._images.content, image_id, number, tenant)

    async def data(self, image_id: str, number: int, tenant: str = "") -> bytes:
        """See deployments.service.Service."""
        return await asyncio.to_thread(self._images.data, image_id, number, tenant)

    async def health(self) -> Mapping[str, Any]:
        """See deployments.service.Service. The store is asked for an image that is not there."""
        try:
            running = await asyncio.to_thread(running_replicas)
        except (RayError, KeyError) as error:  # no controller, or one that has just started
            raise WorkerUnavailable("Ray's controller does not answer; try again.") from error
        missing = [name for name in self._remote.names if running.get(name, 0) == 0]
        if missing:
            raise WorkerUnavailable(f"No {' and no '.join(missing)} is running yet; models may be loading. Try again.")
        with suppress(ImageNotFound):
            await asyncio.to_thread(self._images.record, "0" * 32)
        return {"status": "ok", "replicas": running}

    def models(self) -> Mapping[str, Any]:
        """See deployments.service.Service."""
        return listing(PRESETS[self._settings.preset])
