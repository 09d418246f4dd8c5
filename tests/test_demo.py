"""The demo's requests, through the HTTP layer and the shipped miniature in one process; with Ray it is `make demo`."""

import asyncio

import httpx
import numpy as np
import pytest

from cluster.demo import portrait, real_faces
from deployments.api import create_api
from pipeline import flow
from pipeline.errors import FaceIndexOutOfRange
from pipeline.models.alignment import overlap
from pipeline.settings import LimitSettings, Settings
from pipeline.stored import Stored
from tests.loopback import HERE
from tests.service import InProcess as OneProcess

# where one sees them: the astronaut's face, and the middles of the six people's, from the left
ASTRONAUT = (170, 60, 280, 175)
READ = 1024 / 1280  # the photo's long edge as the service reads it, and as it is
SIX_PEOPLE = [(115, 325), (317, 213), (512, 343), (790, 413), (945, 135), (1172, 335)]


class Service(OneProcess):
    """The whole way in one process, with the real stages."""

    def __init__(self, folder, settings):
        super().__init__(Settings(weights_dir=folder))
        self.stages = flow.load_stages(settings)


class Finds(OneProcess):
    """A service that finds so many faces in any photo, and draws nothing."""

    def __init__(self, folder, count):
        super().__init__(Settings(weights_dir=folder))
        self.count = count

    async def generate(self, request, tenant="", progress=None):
        if any(person.face >= self.count for person in request.people):
            raise FaceIndexOutOfRange("There are not so many faces.")
        faces = [[{"photo": 0, "box": [1, 2, 3, 4], "score": 0.9}] for _ in request.people]
        record = {"id": "0" * 32, "pictures": [], "faces": faces, "prompt_truncated": False, "timings": {}}
        return Stored("0" * 32, (), record)


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
def client(settings, tmp_path_factory):
    api = create_api(
        Service(tmp_path_factory.mktemp("notes"), settings), Settings(limits=LimitSettings(request_seconds=120))
    )
    with httpx.Client(transport=InProcess(api), base_url=HERE) as client:
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
    """One astronaut, and six people in one photo, each where one sees them."""
    found = dict(real_faces(client))
    (face,) = np.array(found["an astronaut"])
    assert overlap(face, ASTRONAUT)[0] > 0.7
    boxes = np.array(found["six people"])
    np.testing.assert_allclose((boxes[:, :2] + boxes[:, 2:]) / 2, np.array(SIX_PEOPLE) * READ, atol=20)


@pytest.mark.parametrize(("count", "how"), [(0, "fewer than the 1 face"), (2, "more than the 1 face")])
def test_another_number_of_faces_is_told(tmp_path, count, how):
    """Where no face is found, or one too many, the demo ends with a sentence."""
    service = InProcess(create_api(Finds(tmp_path, count), Settings(limits=LimitSettings())))
    with (
        httpx.Client(transport=service, base_url=HERE) as client,
        pytest.raises(SystemExit, match=f"astronaut .* {how}"),
    ):
        list(real_faces(client))
