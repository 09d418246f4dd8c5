"""The whole service in one process, without Ray: the real API, jobs, board and store over the fake stages."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from deployments.about import listing
from deployments.board import Board
from deployments.identities import Identities
from deployments.jobs import Jobs
from deployments.outbox import Outbox
from deployments.runner import Runner
from deployments.worker import Worker
from pipeline import flow
from pipeline.events import Stepped
from pipeline.identities import IdentityStore
from pipeline.job_store import JobStore
from pipeline.jobs import new_id
from pipeline.objects_memory import MemoryObjects
from pipeline.presets import PRESETS
from pipeline.store import ImageStore
from pipeline.uploads import UploadStore
from tests.fakes import FakeDenoise, FakeFaces, FakeIdentity, FakeText

MODELS = {"faces": "00", "identity": "11"}  # what the traces of the fakes say


class Silent:
    """Nobody has a webhook here."""

    attempts = 1

    def deliver(self, url, delivery_id, body, tenant):
        """Nothing is sent."""

    def retry_delay(self, delivery_id, tries):
        return 1.0


class InProcess:
    """deployments.service.Service over `objects`; `steps` of each picture are told when somebody watches."""

    def __init__(self, settings, objects=None, sender=None, make=None):
        self.settings = settings
        self.stages = flow.Stages(
            faces=FakeFaces(settings).detect,
            identity=FakeIdentity(settings).encode,
            text=FakeText(settings).encode,
            denoise=FakeDenoise(settings).denoise,
        )
        self.objects = objects or MemoryObjects()
        self.images = ImageStore(self.objects)
        self.store = JobStore(self.objects, self.images, settings.jobs)
        self.board = Board(600)
        outbox = Outbox(self.store, sender or Silent())
        worker = Worker(self.store, self.images, make or self.make, self.board, outbox, settings.jobs)
        self.runner = Runner(self.store, worker, self.board, settings.jobs)
        self.jobs = Jobs(self.store, self.runner, self.board, outbox, settings.jobs, self.check)
        self.uploads = UploadStore(self.objects, settings.photos.max_bytes)
        self.identities = Identities(IdentityStore(self.objects, settings.identities, lambda: MODELS), self)

    @asynccontextmanager
    async def life(self, app=None):
        """While its jobs are run: a FastAPI lifespan."""
        self.runner.start(new_id())
        try:
            yield
        finally:
            await self.runner.close()

    async def make(self, request, tenant, expires, progress=None):
        stages = replace(self.stages, stored=await self.identities.named(request, tenant))
        pictures = await asyncio.to_thread(flow.chain, request, stages, tenant)
        for number, picture in enumerate(pictures):
            for step in range(picture.steps if progress else 0):
                progress(number, Stepped(step + 1, picture.steps))
        return pictures

    async def check(self, request, tenant):
        flow.stored_people(request, await self.identities.named(request, tenant), tenant)

    async def generate(self, request, tenant="", progress=None):
        request = request.with_seed()
        pictures = await self.make(request, tenant, float("inf"), progress)
        return self.images.save(new_id(), request, pictures, tenant)

    async def content(self, image_id, number, tenant=""):
        return self.images.content(image_id, number, tenant)

    async def data(self, image_id, number, tenant=""):
        return self.images.data(image_id, number, tenant)

    async def health(self):
        return {"status": "ok"}

    def models(self):
        return listing(PRESETS[self.settings.preset])

    async def read_faces(self, person, tenant):
        return await asyncio.to_thread(self.stages.faces, person, 0, tenant)

    async def encode(self, faces, fusion, tenant):
        return await asyncio.to_thread(partial(self.stages.identity, faces, fusion, tenant))
