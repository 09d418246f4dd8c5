"""Bad photos, faces, masks and addresses through the HTTP layer and the real stages of the miniature, in one process.

The files themselves, and what each is told, are in test_photos.py, test_fetch.py and test_request.py; here every one of
them takes the way of a real request. Bad bodies are in test_api.py.
"""

import asyncio
import base64
import functools
import io

import httpx
import numpy as np
import pytest
from PIL import Image
from skimage import data

from deployments.api import create_api
from pipeline.faces import FaceDetector
from pipeline.flow import Stages, chain
from pipeline.settings import LimitSettings, Settings
from tests.loopback import HERE
from tests.service import InProcess
from tests.test_fetch import ODD_ADDRESSES
from tests.test_photos import DAMAGED, HUGE, OTHERS


class Service(InProcess):
    """The chain as far as the face detector, which is where all of these end."""

    def __init__(self, folder):
        super().__init__(Settings(weights_dir=folder))
        self.detector = FaceDetector.load(Settings(device="cpu"))

    async def generate(self, request, tenant="", progress=None):
        """Raises what the detector raises; whatever gets past it is the test's failure."""

        def stop(*_):
            raise AssertionError("a bad input got past the face detector")

        work = functools.partial(chain, request, Stages(self.detector.detect, stop, stop, stop))
        return await asyncio.to_thread(work)


@pytest.fixture(scope="module")
def post(tmp_path_factory):
    """Sends people to the API; answers with status, code and detail."""
    service = Service(tmp_path_factory.mktemp("notes"))
    api = create_api(service, Settings(limits=LimitSettings(request_seconds=60)))

    def post(**person):
        async def go():
            transport = httpx.ASGITransport(api)
            async with httpx.AsyncClient(transport=transport, base_url=HERE) as client:
                return await client.post("/v1/images", json={"prompt": "portrait", "people": [person]}, timeout=60)

        answer = asyncio.run(go())
        assert answer.headers["content-type"] == "application/problem+json"
        return answer.status_code, answer.json()["code"], answer.json()["detail"]

    return post


def photo(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS.keys())
def test_other_formats(post, content):
    """What is no JPEG, PNG or WebP by its bytes is told so, whatever it calls itself."""
    status, code, detail = post(photos=["data:image/jpeg;base64," + base64.b64encode(content).decode()])
    assert (status, code) == (422, "photo_type_unsupported")
    assert detail.startswith("people[0].photos[0] ")


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files(post, content):
    """Cut-off, hostile and tiny pictures are unreadable."""
    assert post(photos=[base64.b64encode(content).decode()])[:2] == (422, "photo_unreadable")


@pytest.mark.parametrize("content", HUGE.values(), ids=HUGE.keys())
def test_pictures_of_too_many_pixels(post, content):
    """A header that announces too many pixels is enough."""
    assert post(photos=[base64.b64encode(content).decode()])[:2] == (413, "photo_too_large")


@pytest.mark.parametrize("address", [url for urls in ODD_ADDRESSES.values() for url in urls])
def test_odd_addresses(post, address):
    """No address but a plain public https one is connected to."""
    status, code, _ = post(photos=[{"url": address}])
    assert (status, code) in {(422, "photo_address_refused"), (422, "invalid_request")}


def test_an_address_of_any_length(post):
    """An address is at most 2048 characters."""
    assert post(photos=["https://example.com/" + "x" * 3000])[:2] == (422, "invalid_request")


FACELESS = {
    "flat": np.full((400, 400, 3), 200, np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8),
    "stripes": np.tile(np.arange(400, dtype=np.uint8)[:, None, None] * 8, (1, 400, 3)),
    "upside-down": data.astronaut()[::-1].copy(),
    "tiny": np.pad(data.astronaut()[::16, ::16], ((0, 400), (0, 400), (0, 0))),
    "a coin": np.repeat(data.coins()[..., None], 3, axis=2),
}


@pytest.mark.parametrize("pixels", FACELESS.values(), ids=FACELESS.keys())
def test_photos_without_a_usable_face(post, pixels):
    """No face, or none upright and large enough, is no_face, and names the photo."""
    status, code, detail = post(photos=[photo(data.astronaut()), photo(pixels)])
    assert (status, code) == (422, "no_face")
    assert detail.startswith("people[0].photos[1] ")


def test_a_face_that_is_not_there(post):
    """Counting beyond the last face says how many there are."""
    status, code, detail = post(photos=[photo(data.astronaut())], face=1)
    assert (status, code) == (422, "face_index_out_of_range")
    assert "1 face" in detail


def test_a_bad_mask(post):
    """A mask that is no picture is refused before anything is drawn."""
    status, code, detail = post(photos=[photo(data.astronaut())], mask={"base64": "bm8="})
    assert (status, code) == (422, "mask_unreadable")
    assert detail.startswith("people[0].mask ")
