"""Replicate's own SDK against the routes that speak its API, over a real HTTPS server and the fake stages."""

import asyncio
import base64
import io
import json
import socket
import ssl
import threading
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import replicate
import uvicorn
from PIL import Image
from replicate.exceptions import ModelError, ReplicateError
from replicate.webhook import Webhooks

from deployments.api import create_api
from deployments.keys import fingerprint
from deployments.replicate_api import wait_seconds
from deployments.replicate_body import Create, Input, Reference, echo, request
from pipeline.errors import ImageNotFound, InvalidRequest, PhotoTooLarge, PhotoTypeUnsupported, StoreCorrupt
from pipeline.jobs import begun, named
from pipeline.objects_memory import MemoryObjects
from pipeline.request import NewIdentity
from pipeline.settings import JobSettings, KeySettings, LimitSettings, PhotoSettings, Settings, WebhookSettings
from pipeline.uploads import MOST, SECONDS, UploadStore
from pipeline.webhooks import sign
from tests.fakes import ENDLESS
from tests.loopback import HERE
from tests.service import InProcess
from tests.web import HOST, certificate

KEYS = {tenant: f"pulid_{tenant[0] * 43}" for tenant in ("acme", "other")}
MODEL = "zsxkib/flux-pulid"
HASH = "8baa7ef2255075b46f4d91cd238c21d31181b3e6a864463f967960bb0112525b"
SECRET = "of tests only, and long enough"


def picture(color="teal", size=(64, 64)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


FACE = picture()
WALL = "data:image/png;base64," + base64.b64encode(b"a wall").decode()
DATA = "data:image/png;base64," + base64.b64encode(b"a face").decode()
SMALL = {"prompt": "portrait", "width": 256, "height": 256, "num_steps": 4, "seed": 7}


class Service(InProcess):
    """The service in one process; it notes requests and deliveries, and a prompt of ENDLESS never comes to its end."""

    attempts = 1

    def __init__(self, settings):
        self.asked, self.told, self.running = [], [], threading.Event()
        super().__init__(settings, sender=self, make=self.make)

    async def make(self, request, tenant, expires, progress=None):
        self.asked.append((request, tenant))
        self.running.set()
        if request.prompt == ENDLESS:
            await asyncio.Event().wait()
        # the fake detector reads base64 alone, where the real one knows data: addresses
        people = [person.model_copy(update={"photos": tuple(map(bare, person.photos))}) for person in request.people]
        request = request.model_copy(update={"people": tuple(people)})
        return await super().make(request, tenant, expires, progress)

    def deliver(self, url, delivery_id, body, tenant):
        self.told.append((url, delivery_id, json.loads(body)))
        return True

    def retry_delay(self, delivery_id, tries):
        return 1.0


def bare(photo):
    return photo.model_copy(update={"base64": (photo.base64 or "").rpartition(",")[2]})


@contextmanager
def serving(app, folder):
    """An application on a port of this machine, over TLS; its address."""
    paths = [folder / "certificate.pem", folder / "key.pem"]
    for path, data in zip(paths, certificate(), strict=True):
        path.write_bytes(data)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        config = uvicorn.Config(app, log_level="error", ssl_certfile=paths[0], ssl_keyfile=paths[1])
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"https://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Here(httpx.HTTPTransport):
    """Trusts the certificate of tests/web.py, which is another host's, on this machine."""

    def handle_request(self, request):
        request.extensions["sni_hostname"] = HOST
        return super().handle_request(request)


class AsyncHere(httpx.AsyncHTTPTransport):
    """The same for asyncio."""

    async def handle_async_request(self, request):
        request.extensions["sni_hostname"] = HOST
        return await super().handle_async_request(request)


def tls():
    return ssl.create_default_context(cadata=certificate()[0].decode())


@pytest.fixture
def settings(tmp_path):
    entries = [{"tenant": tenant, "sha256": fingerprint(key)} for tenant, key in KEYS.items()]
    (tmp_path / "keys.json").write_text(json.dumps(entries))
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "notes").mkdir()
    return Settings(
        weights_dir=tmp_path / "notes",
        keys=KeySettings(file=tmp_path / "keys.json"),
        limits=LimitSettings(max_body_bytes=300_000, request_seconds=30),
        photos=PhotoSettings(max_bytes=100_000),
        jobs=JobSettings(scan_seconds=0.05, lease_seconds=2),
        webhooks=WebhookSettings(secret_file=tmp_path / "secret"),
    )


@pytest.fixture
def service(settings):
    return Service(settings)


@pytest.fixture
def url(service, settings, tmp_path):
    with serving(create_api(service, settings, service.life), tmp_path) as url:
        yield url


@pytest.fixture
def connect(url):
    """Makes the SDK's client: nothing but its base address is unusual."""
    with ExitStack() as connections:

        def connect(tenant="acme"):
            transport = Here(verify=tls())
            connections.callback(transport.close)
            return sdk(url, tenant, transport)

        yield connect


def sdk(url, tenant, transport):
    client = replicate.Client(api_token=KEYS.get(tenant), base_url=url, transport=transport)
    client.poll_interval = 0.02
    return client


@pytest.fixture
def client(connect):
    return connect()


def opened(data):
    image = Image.open(io.BytesIO(data))
    return image.format, image.size


# --- predictions


@pytest.mark.parametrize("reference", [MODEL, f"{MODEL}:{HASH}", "pulid-serve/flux-pulid"])
def test_a_program_for_flux_pulid_runs(service, client, tmp_path, reference):
    """replicate.run with an open file gives pictures that can be read, with the model's own defaults."""
    (tmp_path / "me.png").write_bytes(FACE)
    with (tmp_path / "me.png").open("rb") as file:
        outputs = client.run(reference, input={"main_face_image": file, "width": 256, "height": 256, "num_outputs": 2})
    assert [opened(output.read()) for output in outputs] == [("WEBP", (256, 256))] * 2
    request, tenant = service.asked[0]
    assert base64.b64decode(request.people[0].photos[0].base64) == FACE
    assert (request.num_steps, request.guidance_scale, request.output_quality, tenant) == (20, 4.0, 80, "acme")


def test_async_programs_run_too(url):
    """replicate.async_run does the same, with the file in the request itself."""

    async def run():
        async with AsyncHere(verify=tls()) as transport:
            return await use(sdk(url, "acme", transport))

    async def use(client):
        file = io.BytesIO(b"a face")
        given = {**SMALL, "main_face_image": file}
        (output,) = await client.async_run(MODEL, input=given, file_encoding_strategy="base64")
        one = await client.predictions.async_create(version=HASH, input=SMALL)
        await one.async_wait()
        other = await client.predictions.async_create(version=HASH, input={**SMALL, "prompt": ENDLESS})
        await other.async_cancel()
        secret = await client.webhooks.default.async_secret()
        uploaded = await client.files.async_create(io.BytesIO(FACE))
        return await output.aread(), one.status, other.status, secret.key, uploaded.size

    data, *statuses, key, size = asyncio.run(run())
    assert opened(data) == ("WEBP", (256, 256))
    assert statuses == ["succeeded", "canceled"]
    assert (key.startswith("whsec_"), size) == (True, len(FACE))


def test_a_prediction_from_its_making_to_its_end(client, url):
    """It starts, ends, and tells times, progress, its input without photos, and where its pictures are."""
    given = {**SMALL, "main_face_image": DATA}
    prediction = client.predictions.create(version=HASH, input=given)
    assert (prediction.status, prediction.output, prediction.completed_at) == ("starting", None, None)
    prediction.wait()
    assert (prediction.status, prediction.error, prediction.version) == ("succeeded", None, HASH)
    assert prediction.input == SMALL
    assert prediction.output == [f"{url}/v1/predictions/{prediction.id}/output/0.webp"]
    assert (prediction.progress.current, prediction.progress.total) == (4, 4)
    assert prediction.created_at <= prediction.started_at <= prediction.completed_at
    assert prediction.metrics["predict_time"] >= 0


def test_the_picture_is_the_one_of_our_own_api(client, url):
    """The same values give the same pixels by either API, and each API knows the other's work."""
    data = base64.b64encode(b"a face").decode()
    with httpx.Client(transport=Here(verify=tls()), base_url=url, headers=bearer()) as plain:
        body = {**SMALL, "output_format": "png", "timestep_to_start_cfg": 0, "people": [{"photos": [data]}]}
        ours = plain.post("/v1/images", json=body).json()
        pixels = plain.get(ours["images"][0]["url"]).content
        (theirs,) = client.run(MODEL, input={**SMALL, "output_format": "png", "main_face_image": DATA})
        assert theirs.read() == pixels
        assert plain.get(theirs.url).headers["content-type"] == "image/png"
        other = client.predictions.get(ours["id"])
        assert (other.status, other.completed_at is None) == ("succeeded", False)
        own = plain.get(f"/v1/images/{theirs.url.split('/')[-3]}").json()
        assert (own["seeds"], own["origin"]["input"]["seed"]) == ([7], 7)


def bearer(tenant="acme"):
    return {"authorization": f"Bearer {KEYS[tenant]}"}


def test_pictures_are_their_tenants_alone(client, connect, url):
    """Another's prediction is not there, and neither are pictures of numbers that do not exist."""
    prediction = client.predictions.create(version=HASH, input=SMALL)
    prediction.wait()
    with pytest.raises(ReplicateError) as refused:
        connect("other").predictions.get(prediction.id)
    assert refused.value.status == 404
    with httpx.Client(transport=Here(verify=tls())) as plain:
        address = prediction.output[0]
        assert plain.get(address).status_code == 401
        wrong = (address.replace("0.webp", name) for name in ("1.webp", "0.gif", "../0.webp", "٠.webp", "00.webp"))
        assert {plain.get(address, headers=bearer()).status_code for address in wrong} == {404}
        assert plain.get(address, headers=bearer("other")).status_code == 404


def test_a_model_that_fails_says_why(client):
    """ModelError names the input's own field."""
    with pytest.raises(ModelError, match="main_face_image shows no face") as failed:
        client.run(MODEL, input={**SMALL, "main_face_image": WALL})
    assert failed.value.prediction.status == "failed"


def test_who_waits_in_vain_is_told_that_it_starts(client, service):
    """`wait=1` holds the answer for a second; SDKs take every other status but `starting` for an end."""
    prediction = client.predictions.create(version=HASH, input={**SMALL, "prompt": ENDLESS}, wait=1)
    assert prediction.status == "starting"
    assert client.predictions.get(prediction.id).status == "processing"
    prediction.cancel()
    assert (prediction.status, prediction.output) == ("canceled", None)


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ("", 0),
        ("respond-async", 0),
        ("wait", 60),
        ("wait=5", 5),
        ('wait="5"', 5),
        ("wait=900", 60),
        ("handling, wait", 60),
    ]
    + [("await", 0), ("wait=-1", 0), ("WAIT=2", 2), ("respond-async, wait=3", 3)],
)
def test_how_long_an_answer_is_held(prefer, seconds):
    """At most a minute, as Replicate has it."""
    assert wait_seconds(prefer, 100) == seconds


@pytest.mark.parametrize("key", [None, "once"])
def test_a_caller_who_goes_away_stops_the_work(service, settings, key):
    """Unless an Idempotency-Key brings it back."""

    async def test():
        app = create_api(service, settings)
        headers = {**bearer(), "prefer": "wait", **({} if key is None else {"idempotency-key": key})}
        body = {"version": HASH, "input": {**SMALL, "prompt": ENDLESS}}
        async with service.life(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE) as plain:
            waiting = asyncio.ensure_future(plain.post("/v1/predictions", json=body, headers=headers))
            while not service.running.is_set():
                await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            (entry,) = service.objects.list("jobs/acme/")
            return (await service.jobs.view("acme", named(entry.key)[1]))["status"]

    assert asyncio.run(test()) == ("cancelled" if key is None else "running")


def test_a_key_makes_one_prediction(client):
    """The same Idempotency-Key again is the same prediction, and says so."""
    answers = [
        client._client.post(
            "/v1/predictions", json={"version": HASH, "input": SMALL}, headers={"Idempotency-Key": "one"}
        )
        for _ in range(2)
    ]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert [answer.headers.get("idempotency-replayed") for answer in answers] == [None, "true"]


def test_a_stream_tells_steps_and_pictures(client):
    """replicate.stream gives a line for each step, the address of each picture, and an end."""
    events = list(client.stream(MODEL, input={**SMALL, "num_outputs": 2}))
    assert [event.event.value for event in events] == ["logs"] * 8 + ["output"] * 2 + ["done"]
    assert events[3].data.endswith("4/4")
    assert [opened(event.data.read()) for event in events[8:10]] == [("WEBP", (256, 256))] * 2


@pytest.mark.parametrize(("given", "end"), [(ENDLESS, "done"), (WALL, "error")])
def test_a_stream_ends_as_the_prediction_does(client, given, end):
    """A cancelled one is done, a failed one says why."""
    values = {"prompt": given} if given == ENDLESS else {"main_face_image": given}
    prediction = client.predictions.create(version=HASH, input={**SMALL, **values})
    if end == "error":
        with pytest.raises(RuntimeError, match="main_face_image shows no face"):
            list(prediction.stream())
        return
    prediction.cancel()
    assert [event.data for event in prediction.stream()] == ['{"reason": "canceled"}']


def test_a_stored_identity_and_several_people(client, service):
    """`identity` and `people` go beyond flux-pulid's own input."""
    new = NewIdentity(photos=[base64.b64encode(b"a face").decode()])
    identity = asyncio.run(service.identities.add(new, "acme"))["id"]
    by_photo, by_identity, by_people = (
        client.run(MODEL, input={**SMALL, **who})[0].read()
        for who in ({"main_face_image": DATA}, {"identity": identity}, {"people": [{"photos": [DATA]}]})
    )
    assert by_photo == by_identity == by_people
    with pytest.raises(ReplicateError, match="detail: identity: There is no such identity"):
        client.run(MODEL, input={**SMALL, "identity": "0" * 32})


# --- inputs

REFUSED = {
    "unknown field": ({"stepz": 3}, "input.stepz"),
    "too many steps": ({"num_steps": 31}, "input.num_steps"),
    "number as text": ({"width": "256"}, "input.width"),
    "too small": ({"width": 255}, "input.width"),
    "too large": ({"height": 1537}, "input.height"),
    "too long": ({"max_sequence_length": 513}, "input.max_sequence_length"),
    "unknown format": ({"output_format": "base64"}, "input.output_format"),
    "true as number": ({"width": True}, "input.width"),
    "weight": ({"main_face_image": DATA, "id_weight": 4}, "input.id_weight"),
    "photo as number": ({"main_face_image": 3}, "input.main_face_image"),
    "photo as list": ({"main_face_image": [DATA]}, "input.main_face_image"),
    "both": ({"main_face_image": DATA, "identity": "0" * 32}, "input.main_face_image"),
    "people and a face": ({"main_face_image": DATA, "people": []}, "input.people"),
    "people as number": ({"people": 3}, "input.people"),
    "people of numbers": ({"people": [{"photos": [3, {"url": 3}]}]}, "input.people[0].photos[0]"),
    "empty prompt": ({"prompt": " "}, "input"),
}


@pytest.mark.parametrize(("given", "field"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_input_is_named(given, field):
    """Each is refused by the name that its caller knows it by."""
    with pytest.raises(InvalidRequest) as refused:
        request(Create(version=HASH, input=given))
    assert field in [name for name, _ in refused.value.fields]


def test_errors_are_problems(client, connect):
    """What SDKs read of an error: title, detail and status; values are not repeated."""
    secret = "a very private wish"
    bodies = [{"num_steps": secret}, {secret: 1}]
    for given in bodies:
        with pytest.raises(ReplicateError) as refused:
            client.predictions.create(version=HASH, input=given)
        assert (refused.value.status, refused.value.detail.startswith("The request does not fit")) == (422, True)
        assert secret not in str(refused.value)
    with pytest.raises(ReplicateError) as refused:
        connect("nobody").predictions.create(version=HASH, input=SMALL)
    assert (refused.value.status, bool(refused.value.title)) == (401, True)


def test_another_model_is_not_answered_for(client):
    """A name that is not flux-pulid's is 404 in an address and 422 in a body."""
    for call in (
        lambda: client.run("stability-ai/sdxl", input={"prompt": "portrait"}),
        lambda: client.models.get("stability-ai/sdxl"),
        lambda: client.models.get("zsxkib/flux-pulid").versions.get("1"),
    ):
        with pytest.raises(ReplicateError) as refused:
            call()
        assert refused.value.status == 404
    with pytest.raises(ReplicateError) as refused:
        client.predictions.create(version="stability-ai/sdxl", input={"prompt": "portrait"})
    assert refused.value.status == 422


def test_the_model_says_what_it_takes(client):
    """models.get and versions tell a schema with every field of the input; its output is a list, and no iterator."""
    model = client.models.get(MODEL)
    (version,) = model.versions.list()
    schemas = version.openapi_schema["components"]["schemas"]
    assert (model.id, model.latest_version.id) == (MODEL, version.id)
    assert schemas["Input"]["properties"].keys() == Input.model_fields.keys()
    assert schemas["Input"]["properties"]["num_steps"]["maximum"] == 30
    assert "x-cog-array-type" not in schemas["Output"]
    assert model.versions.get(HASH).id == HASH


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (HASH, Reference(version=HASH)),
        (MODEL, Reference(MODEL)),
        (f"{MODEL}:{HASH}", Reference(MODEL, HASH)),
        ("flux-pulid", None),
        (f"{MODEL}:1", None),
        (f"{MODEL}\n", None),
        ("a/b/flux-pulid", None),
    ],
)
def test_which_model_is_meant(text, found):
    """A name, a version, or both."""
    assert Reference.parse(text) == found


def test_sizes_are_rounded_up_as_flux_pulid_rounds_them():
    """Every size that flux-pulid takes is taken; null is as good as nothing, and a seed of -1 is none."""
    asked = request(
        Create(input={"width": 257, "height": 1001, "max_sequence_length": 200, "seed": -1, "prompt": None})
    )
    assert (asked.width, asked.height, asked.max_sequence_length) == (272, 1008, 256)
    assert (asked.seed, asked.prompt, asked.people) == (None, "portrait, color, cinematic", ())


def test_a_start_step_is_that_of_the_second_pass_too():
    """As in flux-pulid."""
    asked = request(Create(input={"main_face_image": DATA, "start_step": 4, "true_cfg": 2.0, "id_weight": 0.5}))
    assert (asked.people[0].start_step, asked.timestep_to_start_cfg, asked.people[0].id_weight) == (4, 4, 0.5)


def test_an_echo_has_no_photos_and_no_secrets():
    """Of photos only addresses come back, and are kept: without their query, where signatures stand."""
    address = "https://photos.example/a.png"
    signed = {"url": f"{address}?X-Amz-Signature=00#x"}
    mask = {"base64": "AAAA"}
    given = {**SMALL, "main_face_image": signed["url"], "people": [{"photos": [signed, DATA], "face": 0, "mask": mask}]}
    assert echo(given) == {**SMALL, "main_face_image": address, "people": [{"photos": [address], "face": 0}]}
    assert echo({"main_face_image": DATA, "seed": 7}) == {"seed": 7}


# --- webhooks


@pytest.mark.parametrize(
    ("asked", "statuses"),
    [
        ({"webhook_events_filter": ["start", "completed"]}, ["processing", "succeeded"]),
        ({"webhook_events_filter": ["logs", "output"]}, ["processing"] * 4 + ["succeeded"]),
        ({}, ["succeeded"]),
    ],
)
def test_webhooks_are_told_the_prediction(client, service, url, asked, statuses):
    """At the moments that were chosen, as the prediction is then, with addresses that lead here."""
    hook = "https://hooks.example/1"
    prediction = client.predictions.create(version=HASH, input=SMALL, webhook=hook, **asked)
    prediction.wait()
    while any(True for _ in service.objects.list("jobs/")):  # its end is told before the job is forgotten
        threading.Event().wait(0.02)
    bodies = [body for _, _, body in service.told]
    assert [body["status"] for body in bodies] == statuses
    assert {(address, body["id"]) for address, _, body in service.told} == {(hook, prediction.id)}
    last = client._client.get(f"/v1/predictions/{prediction.id}").json()
    assert bodies[-1] == last
    assert last["output"][0].startswith(url)


def test_the_older_webhook_is_told_of_the_end():
    """webhook_completed, too."""
    asked = request(Create(version=HASH, input=SMALL, webhook_completed="https://hooks.example/1"))
    assert asked.webhook == "https://hooks.example/1"
    assert asked.webhook_events == ("succeeded", "failed", "cancelled")


def test_the_secret_checks_what_is_signed(client, connect):
    """Each tenant has its own, and the SDK's validator agrees with it."""
    secret, others = client.webhooks.default.secret(), connect("other").webhooks.default.secret()
    key = base64.b64decode(secret.key.removeprefix("whsec_"))
    headers = {"webhook-id": "1", "webhook-timestamp": "1", "webhook-signature": sign(key, "1", 1, b"{}")}
    Webhooks.validate(headers=headers, body="{}", secret=secret)
    with pytest.raises(ValueError, match="signature"):
        Webhooks.validate(headers=headers, body="{}", secret=others)


# --- files


def test_a_file_from_its_sending_to_its_erasing(client, connect):
    """It is told as the SDK reads it, is its tenant's alone, and goes when it is told to."""
    file = client.files.create(io.BytesIO(FACE), metadata={"of": "me"})
    assert (file.size, file.content_type, file.metadata) == (len(FACE), "image/png", {"of": "me"})
    assert client.files.get(file.id) == file
    assert [one.id for one in client.files.list()] == [file.id]
    assert connect("other").files.list() == []
    for call in (lambda: connect("other").files.get(file.id), lambda: connect("other").files.delete(file.id)):
        with pytest.raises(ReplicateError) as refused:
            call()
        assert refused.value.status == 404
    assert client.files.delete(file.id)
    assert client.files.list() == []


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        ({"files": {"content": b"not a picture"}}, 422, "photo_type_unsupported"),
        ({"files": {"content": FACE + bytes(100_000)}}, 413, "photo_too_large"),
        ({"files": {"content": bytes(200_000)}}, 413, "body_too_large"),
        ({"files": {"other": FACE}}, 422, "invalid_request"),
        ({"data": {"content": "text"}, "files": {"x": b""}}, 422, "invalid_request"),
        ({"files": {"content": FACE}, "data": {"metadata": "[]"}}, 400, "malformed_body"),
        ({"files": {"content": FACE}, "data": {"metadata": '"' + "x" * 5000}}, 422, "invalid_request"),
        ({"files": {"content": FACE}, "data": {"filename": "a\nb"}}, 422, "invalid_request"),
        ({"files": [("content", FACE), ("content", FACE)]}, 400, "malformed_body"),
        ({"json": {}}, 415, "unsupported_content_type"),
    ],
)
def test_what_is_no_file_is_refused(client, service, sent, status, code):
    """With a code, and nothing is kept."""
    answer = client._client.post("/v1/files", **sent)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert not list(service.objects.list("files/"))


def test_a_file_is_read_from_the_store_alone(client, connect, service, url):
    """Its tenant's requests take its bytes along; another tenant's, and one that is gone, are refused at once."""
    mine = client.files.create(io.BytesIO(FACE)).urls["get"]
    client.run(MODEL, input={**SMALL, "people": [{"photos": [{"url": mine}, mine]}]})
    assert [base64.b64decode(photo.base64) for photo in service.asked[0][0].people[0].photos] == [FACE, FACE]
    for who, address in ((connect("other"), mine), (client, f"{url}/v1/files/{'0' * 32}")):
        with pytest.raises(ReplicateError, match="not there any more") as refused:
            who.predictions.create(version=HASH, input={**SMALL, "main_face_image": address})
        assert refused.value.status == 422


def test_another_hosts_file_is_an_address_like_others(client, service):
    """Only this service's own name is looked up in its store; what the photo reader refuses it refuses there."""
    mine = client.files.create(io.BytesIO(FACE)).urls["get"]
    elsewhere = "https://files.example/" + mine.split("/", 3)[3]
    client.predictions.create(version=HASH, input={**SMALL, "main_face_image": elsewhere}).wait()
    assert service.asked[0][0].people[0].photos[0].url == elsewhere


def test_the_files_of_an_input_are_bounded(client):
    """Thirty-two photos of four people must not fill the memory, however small their addresses are."""
    large = client.files.create(io.BytesIO(FACE + bytes(90_000)))
    more = [client.files.create(io.BytesIO(picture(color) + bytes(90_000))) for color in ("red", "blue", "gold")]
    photos = [file.urls["get"] for file in (large, *more)]
    with pytest.raises(ReplicateError, match="together") as refused:
        client.predictions.create(version=HASH, input={**SMALL, "people": [{"photos": photos}]})
    assert refused.value.status == 413


class Clock:
    """Seconds since 1970 that a test moves on."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


def test_a_file_is_over_after_a_day():
    """It is as if it were not there, and the sweep erases it, and what has no record; younger ones stay."""
    objects = MemoryObjects()
    record = UploadStore(objects, 1000).save(FACE, "acme", "me")
    clock = Clock(begun(record["id"]) + SECONDS - 1)
    uploads = UploadStore(objects, 1000, clock)
    assert (uploads.sweep(), uploads.data(record["id"], "acme")) == (0, FACE)
    clock.now += 2
    for call in (uploads.record, uploads.data):
        with pytest.raises(ImageNotFound):
            call(record["id"], "acme")
    assert uploads.records("acme") == []
    assert uploads.sweep() == 2
    assert not list(objects.list("files/"))


def test_a_tenant_has_so_many_files_and_no_more():
    """One beyond them is refused; others have room, and so has who erases one."""
    objects = MemoryObjects()
    for number in range(MOST):
        objects.create(f"files/acme/{number:032x}.json", b"{}")
    uploads = UploadStore(objects, 1000)
    with pytest.raises(InvalidRequest, match="erase"):
        uploads.save(FACE, "acme")
    uploads.save(FACE, "other")
    uploads.delete(f"{0:032x}", "acme")
    assert uploads.save(FACE, "acme")


def test_files_are_checked():
    """When they come and when they are read."""
    objects = MemoryObjects()
    uploads = UploadStore(objects, len(FACE))
    with pytest.raises(PhotoTooLarge):
        uploads.save(FACE + b"x")
    with pytest.raises(PhotoTypeUnsupported):
        uploads.save(b"%PDF-1.7")
    record = uploads.save(FACE)
    for wrong in ("", "0" * 32, "../0", record["id"].upper()):
        with pytest.raises(ImageNotFound):
            uploads.data(wrong)
    key = f"files/_/{record['id']}.photo"
    objects.delete(key)
    objects.create(key, FACE[:-1] + b"x")
    with pytest.raises(StoreCorrupt):
        uploads.data(record["id"])
