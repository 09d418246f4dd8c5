"""OpenAI's own SDK against the routes that speak its API, over a real HTTP server and the fake stages."""

import asyncio
import base64
import io
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

from deployments.api import create_api
from deployments.keys import fingerprint
from deployments.openai_api import Previews
from pipeline import errors, flow
from pipeline.drawing import Work
from pipeline.events import Done, Failed, Previewed, Stepped
from pipeline.request import NewIdentity
from pipeline.settings import KeySettings, LimitSettings, Settings
from tests.fakes import ENDLESS, FakeDenoise, notes
from tests.service import InProcess

FACE, OTHER, WALL = b"a face", b"another face", b"a wall"
KEY = "pulid_" + "k" * 43
SMALL = {"prompt": "portrait", "size": "256x256"}
STEPS = {"extra_body": {"num_steps": 4}}


class Service(InProcess):
    """Its pictures are drawn in an engine, with previews, until they are cancelled; `failure` is raised instead."""

    def __init__(self, settings):
        super().__init__(settings)
        self.painter, self.asked = FakeDenoise(settings), []
        self.failure, self.links, self.lost = None, (), False

    async def make(self, request, tenant, expires, progress=None):
        self.asked.append((request, tenant))
        stored, gone = await self.identities.named(request, tenant), threading.Event()
        loop = asyncio.get_running_loop()

        def denoise(bare, number, text, negative, *identities):
            def listen(event):
                if progress is not None:
                    loop.call_soon_threadsafe(progress, number, event)

            return drawn(self.painter.engine(), Work(bare, number, text, negative, identities), listen, gone.is_set)

        try:
            return await asyncio.to_thread(flow.chain, request, replace(self.stages, stored=stored, denoise=denoise))
        finally:
            gone.set()

    async def generate(self, request, tenant="", progress=None):
        if self.failure is not None:
            raise self.failure
        return replace(await super().generate(request, tenant, progress), urls=self.links)

    async def data(self, image_id, number, tenant=""):
        if self.lost:
            raise errors.StoreUnavailable("The store does not answer; try again.")
        return await super().data(image_id, number, tenant)


def drawn(engine, work, listen, cancelled):
    """A picture, all of whose other events are listened to."""
    ended = []
    ticket = engine.submit(work, lambda event: (ended.append if isinstance(event, Done | Failed) else listen)(event))
    while not ended:
        if cancelled():
            engine.cancel(ticket)
        if not engine.step():
            engine.finish()
    if isinstance(ended[0], Failed):
        raise ended[0].error
    return ended[0].picture


@contextmanager
def serving(app):
    """An application on a port of this machine; its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def service(tmp_path):
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([{"tenant": "acme", "sha256": fingerprint(KEY), "requests_per_minute": 20}]))
    (tmp_path / "notes").mkdir()
    limits = LimitSettings(max_body_bytes=300_000, max_requests=4, request_seconds=30, retry_after_seconds=7)
    return Service(Settings(weights_dir=tmp_path / "notes", keys=KeySettings(file=file), limits=limits))


@pytest.fixture
def url(service):
    with serving(create_api(service, service.settings)) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(api_key=KEY, base_url=f"{url}/v1", max_retries=0) as client:
        yield client


def pixels(text):
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    return image.format, image.size, np.asarray(image)


def test_a_prompt_becomes_a_picture(service, client):
    """images.generate answers with base64, what was asked for, and the tokens; the tenant is the key's."""
    answer = client.images.generate(model="gpt-image-1", quality="low", n=2, user="somebody", **SMALL)
    assert [pixels(image.b64_json)[:2] for image in answer.data] == [("PNG", (256, 256))] * 2
    assert (answer.size, answer.quality, answer.output_format, answer.background) == ("256x256", "low", "png", "opaque")
    assert (answer.usage.input_tokens_details.text_tokens, answer.usage.output_tokens) == (512, 512)
    assert abs(answer.created - time.time()) < 60
    request, tenant = service.asked[0]
    assert (request.num_steps, request.num_outputs, tenant) == (12, 2, "acme")


@pytest.mark.parametrize(
    ("asked", "size", "kind", "steps"),
    [
        ({"size": "auto", "output_format": "jpeg", "output_compression": 0}, (896, 1152), "JPEG", 28),
        ({"size": "1024x1536", "output_format": "webp", "quality": "standard"}, (1024, 1536), "WEBP", 20),
        ({"size": None, "quality": None, "n": None, "background": "auto"}, (896, 1152), "PNG", 28),
    ],
)
def test_sizes_formats_and_quality(service, client, asked, size, kind, steps):
    """They are what OpenAI's names for them say; null is as good as nothing."""
    answer = client.images.generate(prompt="portrait", **asked)
    assert pixels(answer.data[0].b64_json)[:2] == (kind, size)
    assert service.asked[0][0].num_steps == steps


def test_a_photo_becomes_a_person(service, client):
    """images.edit with one file or several makes the picture that POST /v1/images makes, from the same face."""
    more = {"num_steps": 4, "seed": 2**53 - 1, "id_weight": 0.5, "face": 0, "guidance_scale": 3}
    one = client.images.edit(image=FACE, extra_body=more, n=1, size="256x256", prompt="5")
    both = client.images.edit(image=[FACE, OTHER], extra_body={**more, "face": "left"}, size="256x256", prompt="5")
    first, second = (asked[0] for asked in service.asked)
    assert (first.prompt, first.seed, first.guidance_scale) == ("5", 2**53 - 1, 3.0)
    assert (first.people[0].id_weight, first.people[0].face, second.people[0].face) == (0.5, 0, "left")
    assert [len(request.people[0].photos) for request in (first, second)] == [1, 2]
    assert one.usage.input_tokens_details.image_tokens * 2 == both.usage.input_tokens_details.image_tokens == 64
    assert not np.array_equal(pixels(one.data[0].b64_json)[2], pixels(both.data[0].b64_json)[2])


def test_a_stored_identity_needs_no_photo(service, client):
    """extra_body names it: the picture is the one that its photo gives; another tenant's is not there."""
    photo = base64.b64encode(FACE).decode()
    mine, other = (
        asyncio.run(service.identities.add(NewIdentity(photos=[photo]), tenant))["id"] for tenant in ("acme", "other")
    )
    more = {"num_steps": 4, "seed": 7}
    edited = client.images.edit(image=FACE, extra_body=more, **SMALL).data[0].b64_json
    named = client.images.generate(extra_body={**more, "identity": mine}, **SMALL).data[0].b64_json
    assert np.array_equal(pixels(edited)[2], pixels(named)[2])
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(extra_body={"identity": other}, **SMALL)
    assert (refused.value.code, refused.value.param) == ("identity_not_found", "identity")


def test_addresses_work_with_the_key(client, url):
    """DALL-E's programs get an address of the host that they asked, and the pixels there; others when they ask."""
    for asked in ({"model": "dall-e-3", "quality": "hd", "style": "vivid"}, {"response_format": "url"}):
        address = client.images.generate(**asked, **SMALL).data[0].url
        assert address.startswith(f"{url}/v1/images/")
        assert httpx.get(address, headers={"authorization": f"Bearer {KEY}"}).content.startswith(b"\x89PNG")
        assert httpx.get(address).status_code == 401
    forwarded = client.images.generate(response_format="url", extra_headers={"x-forwarded-proto": "https"}, **SMALL)
    assert forwarded.data[0].url.startswith(url.replace("http", "https"))


def test_a_store_with_links_gives_its_own(service, client):
    """They can be opened without a key, as OpenAI's can."""
    service.links = ("https://s3.example/0?signature",)
    assert client.images.generate(response_format="url", **SMALL).data[0].url == service.links[0]


@pytest.mark.parametrize("most", [0, 2, 3])
def test_a_stream_of_partial_images(client, most):
    """stream=True gives previews in the size and format of the picture, spread over its steps, and then the picture."""
    answer = client.images.generate(stream=True, partial_images=most, output_format="webp", **SMALL)
    *partials, last = list(answer)
    assert [event.type for event in partials] == ["image_generation.partial_image"] * most
    assert [event.partial_image_index for event in partials] == list(range(most))
    assert (last.type, last.size, last.output_format) == ("image_generation.completed", "256x256", "webp")
    assert {pixels(event.b64_json)[:2] for event in (*partials, last)} == {("WEBP", (256, 256))}
    assert last.usage.total_tokens == 512 + 256


@pytest.mark.parametrize(("most", "steps"), [(0, []), (1, [16]), (2, [12, 20]), (3, [8, 16, 24])])
def test_partial_images_are_spread_over_the_steps(most, steps):
    """Of a preview after every fourth of 28 steps those are sent that come next after equal parts of the way."""
    previews, sent = Previews(most), []
    for done in range(1, 28):
        previews.wants(Stepped(done, 28))
        if done % 4 == 0 and previews.wants(Previewed(None)):
            sent.append(done)
    assert sent == steps


def test_a_stream_of_edits(client):
    """images.edit streams too, and tells every picture."""
    events = list(client.images.edit(image=FACE, stream=True, partial_images=1, n=2, **SMALL))
    assert [event.type for event in events] == ["image_edit.partial_image"] + ["image_edit.completed"] * 2
    assert events[1].b64_json != events[2].b64_json


REFUSED = {
    "size beyond ours": ({"size": "1792x1024"}, "size"),
    "size that is none": ({"size": "large"}, "size"),
    "transparent": ({"background": "transparent"}, "background"),
    "five": ({"n": 5}, "n"),
    "gif": ({"output_format": "gif"}, "output_format"),
    "another model": ({"model": "flux-dev"}, "model"),
    "unknown": ({"extra_body": {"stepz": 3}}, "stepz"),
    "long prompt": ({"prompt": "x" * 9000}, "prompt"),
    "nobody": ({"extra_body": {"id_weight": 1}}, "id_weight"),
    "steps": ({"extra_body": {"num_steps": 99}}, "num_steps"),
    "no steps left": ({"extra_body": {"num_steps": 1, "identity": "abc", "start_step": 3}}, None),
}


@pytest.mark.parametrize(("asked", "param"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_is_a_bad_request(service, client, asked, param, stream):
    """The SDK raises BadRequestError, which names the parameter as the program does; nothing is drawn."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**{**SMALL, "stream": stream, **asked})
    assert (refused.value.code, refused.value.param, refused.value.type) == (
        "invalid_request",
        param,
        "invalid_request_error",
    )
    assert "people[0]" not in refused.value.message
    assert not service.asked


@pytest.mark.parametrize(
    ("image", "more", "code", "param"),
    [
        (WALL, {}, "no_face", "image"),
        (WALL, {"stream": True}, "no_face", "image"),
        ([FACE] * 9, {}, "invalid_request", "image"),
        (FACE, {"mask": FACE}, "invalid_request", "mask"),
        (FACE, {"markup": FACE}, "invalid_request", None),
        (FACE, {"extra_body": {"people": 3}}, "invalid_request", "people"),
        (FACE, {"extra_body": {"seed": "x"}}, "invalid_request", "seed"),
        (FACE, {"extra_body": {"identity": "abc"}}, "invalid_request", "image"),
    ],
)
def test_photos_that_do_not_fit(client, image, more, code, param):
    """A bad photo is told as a bad `image`, before a stream begins too."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=image, **SMALL, **more)
    assert (refused.value.code, refused.value.param) == (code, param)


BODIES = {
    "not JSON": ("generations", {"content": b"{"}, "malformed_body"),
    "a field twice": ("generations", {"content": b'{"n": 1, "n": 2}'}, "malformed_body"),
    "no prompt": ("generations", {"json": {"n": 1}}, "invalid_request"),
    "text as number": ("generations", {"json": {**SMALL, "n": "2"}}, "invalid_request"),
    "JSON for a form": ("edits", {"json": SMALL}, "unsupported_content_type"),
    "no photo": ("edits", {"data": SMALL, "files": {"mask": b""}}, "invalid_request"),
    "no form at all": (
        "edits",
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        "malformed_body",
    ),
    "a file for text": ("edits", {"data": {}, "files": {"image": FACE, "prompt": FACE}}, "invalid_request"),
}


@pytest.mark.parametrize(("route", "body", "code"), BODIES.values(), ids=BODIES)
def test_bad_bodies_are_told_in_the_same_shape(url, route, body, code):
    """Whatever arrives, the answer is 400 in OpenAI's shape, and repeats nothing of it."""
    headers = {"authorization": f"Bearer {KEY}", **body.pop("headers", {})}
    if "content" in body:
        headers.setdefault("content-type", "application/json")
    answer = httpx.post(f"{url}/v1/images/{route}", headers=headers, **body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


KINDS = {
    errors.Overloaded: (openai.RateLimitError, "overloaded"),
    errors.WorkerUnavailable: (openai.InternalServerError, "worker_unavailable"),
    errors.DeadlineExceeded: (openai.InternalServerError, "deadline_exceeded"),
    ValueError: (openai.InternalServerError, "internal_error"),
    errors.BodyTooLarge: (openai.APIStatusError, "body_too_large"),
}


@pytest.mark.parametrize(("kind", "raised"), KINDS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_failures_are_the_exceptions_that_programs_know(service, client, kind, raised):
    """The SDK raises what it raises for OpenAI, with the code; a secret in an unforeseen error stays here."""
    service.failure = kind("a secret")
    with pytest.raises(raised[0]) as failed:
        client.images.generate(**SMALL)
    assert failed.value.code == raised[1]
    assert kind is not ValueError or "secret" not in str(failed.value)


def test_keys_and_limits(client, url):
    """A wrong key is AuthenticationError, too many requests are RateLimitError; models can be listed."""
    with openai.OpenAI(api_key="sk-wrong", base_url=f"{url}/v1") as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.images.generate(**SMALL)
        assert (refused.value.code, refused.value.type) == ("invalid_api_key", "invalid_request_error")
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
    assert [model.id for model in client.models.list()] == ["miniature"]
    for _ in range(19):
        client.models.list()
    with pytest.raises(openai.RateLimitError) as limited:
        client.images.generate(**SMALL)
    assert limited.value.code == "rate_limit_exceeded"
    assert int(limited.value.response.headers["retry-after"]) >= 1


def test_a_failure_in_a_stream_ends_it(service, client):
    """What fails after the first event is an APIError with the code, and no picture."""
    service.lost = True
    events = client.images.generate(stream=True, partial_images=1, **SMALL)
    assert next(events).type == "image_generation.partial_image"
    with pytest.raises(openai.APIError) as failed:
        list(events)
    assert failed.value.code == "store_unavailable"


def test_streams_that_nobody_reads_stop_their_work(service, client):
    """Closing a stream takes its picture out of the engine, and frees its place."""
    endless = {"prompt": ENDLESS, "size": "256x256", "stream": True, "partial_images": 1}
    streams = [client.images.generate(**endless, extra_body={"seed": seed}) for seed in range(4)]
    with pytest.raises(openai.RateLimitError) as refused:
        client.images.generate(**SMALL)
    assert (refused.value.code, refused.value.response.headers["retry-after"]) == ("overloaded", "7")
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + 20
    while len(notes(service.settings.weights_dir, "stopped")) < 4:
        assert time.monotonic() < deadline, "they go on"
    assert client.images.generate(**SMALL).data


def test_asynchronous_programs(url):
    """AsyncOpenAI works as well, several requests at once."""

    async def go():
        async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{url}/v1") as client:
            return await asyncio.gather(*(client.images.generate(**SMALL, **STEPS) for _ in range(4)))

    assert all(pixels(answer.data[0].b64_json)[1] == (256, 256) for answer in asyncio.run(go()))
