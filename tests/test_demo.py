"""The demo's requests, through the HTTP layer and the shipped miniature in one process; with Ray it is `make demo`."""

import asyncio

import httpx
import numpy as np
import pytest

from cluster.demo import portrait, real_faces
from deployments.api import create_api
from pipeline import flow
from pipeline.models.alignment import overlap
from pipeline.settings import LimitSettings, Settings
from pipeline.store import open_store


class Service:
    """The whole way in one process."""

    def __init__(self, settings):
        self.stages, self.store = flow.load_stages(settings), open_store(settings.store)

    async def generate(self, request):
        return await asyncio.to_thread(flow.generate, request, self.stages, self.store)

    async def content(self, image_id, number):
        return self.store.content(image_id, number)


class InProcess(httpx.BaseTransport):
    """What a client sends goes to an ASGI application, without a network."""

    def __init__(self, api):
        self.transport = httpx.ASGITransport(api)

    def handle_request(self, request):
        async def go():
            async with httpx.AsyncClient(transport=self.transport, timeout=120) as client:
                answer = await client.request(
                    request.method, str(request.url), content=request.content, headers=request.headers
                )
            return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

        return asyncio.run(go())


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return Settings.from_environment({}, device="cpu", store__url=f"file://{tmp_path_factory.mktemp('demo')}")


@pytest.fixture(scope="module")
def client(settings):
    api = create_api(Service(settings), LimitSettings(request_seconds=120))
    with httpx.Client(transport=InProcess(api), base_url="http://demo") as client:
        yield client


def test_a_person_keeps_their_face(client, settings):
    """Of three held-out people, the pictures with the photo are more like it than those without, by another judge."""
    made = [portrait(client, seed) for seed in range(3)]
    assert all(one.sheet().startswith(b"\x89PNG") for one in made)
    assert len({one.prompt for one in made}) == 3
    alike = np.array([one.likeness(settings) for one in made], float)  # None would be NaN
    without, with_photo = alike.mean(axis=0)
    assert with_photo > without + 0.2


def test_real_faces_are_found(client):
    """The astronaut, and six people in one photo: six boxes that are not the same."""
    found = dict(real_faces(client))
    assert len(found["an astronaut"]) == 1
    boxes = np.array(found["six people"])
    assert boxes.shape == (6, 4)
    assert all(overlap(box, np.delete(boxes, at, axis=0)).max() < 0.1 for at, box in enumerate(boxes))
