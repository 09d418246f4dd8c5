"""Stored identities: the store of them, their routes, and requests that name them."""

import asyncio
import base64
import io
import json
import threading

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from skimage import data

from deployments import problems
from deployments.admission import Admission
from deployments.identities import Identities
from deployments.identities_api import ADDRESS, router
from deployments.keys import Caller
from deployments.limits import Limits
from pipeline import flow
from pipeline.errors import IdentityNotFound, IdentityOutdated, PipelineError, StoreCorrupt
from pipeline.faces import FaceDetector
from pipeline.identities import MOST, ORPHAN_SECONDS, IdentityStore, models_in_use
from pipeline.identity import IdentityEncoder
from pipeline.jobs import new_id
from pipeline.objects_local import LocalObjects
from pipeline.request import NewIdentity, Photo, Request
from pipeline.settings import IdentitySettings, LimitSettings, Settings
from tests.fakes import A_FACE, NO_FACE, FakeDenoise, FakeFaces, FakeIdentity, FakeText, memory_store
from tests.loopback import HERE

MODELS = {"faces": "00", "identity": "11"}  # of the fakes
LIMITS = LimitSettings(max_body_bytes=100_000, request_seconds=5)
OTHER_FACE = base64.b64encode(b"another face").decode()
BYTES = [base64.b64decode(A_FACE), base64.b64decode(OTHER_FACE)]


class Stages:
    """The two stages as the router wants them."""

    def __init__(self, settings):
        self.faces, self.identity = FakeFaces(settings), FakeIdentity(settings)

    async def read_faces(self, person, tenant):
        return await asyncio.to_thread(self.faces.detect, person, 0, tenant)

    async def encode(self, faces, fusion, tenant):
        return await asyncio.to_thread(self.identity.encode, faces, fusion, tenant)


class Callers:
    """ASGI middleware: the header x-tenant says who calls."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            scope["state"] = {"caller": Caller(dict(scope["headers"]).get(b"x-tenant", b"").decode())}
        await self.app(scope, receive, send)


class House:
    """The routes over the fake stages, a folder and a clock of its own; `models` are those in use."""

    def __init__(self, folder):
        self.now, self.models = 1_900_000_000.0, dict(MODELS)
        self.folder = folder / "store"
        self.objects = LocalObjects(self.folder)
        (folder / "notes").mkdir()
        self.settings = Settings(weights_dir=folder / "notes")
        self.store = self.opened()
        self.identities = Identities(self.store, Stages(self.settings))
        self.app = FastAPI()
        self.app.include_router(router(self.identities, Admission(32, Limits(), lambda _: 0), LIMITS))
        self.app.add_middleware(Callers)
        self.app.exception_handler(PipelineError)(self.failed)

    def opened(self):
        limits = IdentitySettings(seconds=1000, max_seconds=5000)
        return IdentityStore(self.objects, limits, lambda: self.models, lambda: self.now)

    async def failed(self, _, error):
        return problems.response(error, 5)

    def keys(self, prefix="identities/"):
        return [entry.key for entry in self.objects.list(prefix)]

    def send(self, *calls):
        """Requests at once, each (method, path, options); the answer, or all of several."""

        async def go():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url=HERE) as client:
                return await asyncio.gather(*(client.request(*call[:2], **call[2]) for call in calls))

        answers = asyncio.run(go())
        return answers[0] if len(calls) == 1 else answers

    def add(self, tenant="", **body):
        return self.send(("POST", ADDRESS, {"json": {"photos": [A_FACE], **body}, "headers": {"x-tenant": tenant}}))

    def get(self, path="", method="GET", tenant=""):
        return self.send((method, f"{ADDRESS}{path}", {"headers": {"x-tenant": tenant}}))

    def tokens(self, identity_id):
        return self.store.load(identity_id).tokens


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


def files(photos):
    return [("photos", (f"{number}.png", photo, "image/png")) for number, photo in enumerate(photos)]


def assert_missing(answer):
    assert (answer.status_code, answer.json()["status"], answer.json()["code"]) == (404, 404, "identity_not_found")


def test_a_person_is_stored_and_found(house):
    """The answer names the identity, its faces and how alike they are; its address and the list give the same."""
    answer = house.add(photos=[A_FACE, OTHER_FACE, A_FACE], name="Ada")
    body = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"{ADDRESS}/{body['id']}")
    assert (body["name"], body["fusion"], body["photos_kept"]) == ("Ada", "mean", False)
    assert body["faces"] == [{"photo": number, "box": [1.0, 2.0, 30.0, 40.0], "score": 0.75} for number in range(3)]
    alike = np.array(body["similarity"])
    np.testing.assert_allclose(alike, alike.T)
    assert alike[0, 2] == pytest.approx(1.0)
    assert abs(alike[0, 1]) < 0.5
    assert house.get(f"/{body['id']}").json() == body
    newer = house.add().json()
    assert house.get().json() == {"identities": [newer, body]}


def test_a_tenant_has_so_many_identities_and_no_more(house):
    """One beyond them is refused before it is made; others have room, and so has who erases one."""
    folder = house.folder / "identities" / "acme"
    folder.mkdir(parents=True)
    for number in range(MOST):
        (folder / f"{number:032x}.json").write_bytes(b"{}")
    refused = house.add("acme")
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert house.add("other").status_code == 201
    house.get(f"/{0:032x}", "DELETE", "acme")
    assert house.add("acme").status_code == 201


def test_a_form_is_as_good_as_json(house):
    """multipart/form-data and JSON with the same photos and options give the same identity."""
    options = {"face": "left", "fusion": "concat", "name": "7", "seconds": "50", "keep_photos": "true"}
    form = house.send(("POST", ADDRESS, {"files": files(BYTES), "data": options})).json()
    said = {"face": "left", "fusion": "concat", "name": "7", "seconds": 50, "keep_photos": True}
    plain = house.add(photos=[A_FACE, OTHER_FACE], **said).json()
    assert form.pop("id") != plain["id"]
    assert form == {key: value for key, value in plain.items() if key != "id"}
    first, second = house.get().json()["identities"]
    np.testing.assert_array_equal(house.tokens(first["id"]), house.tokens(second["id"]))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"face": "3x"}, "invalid_request"),
        ({"seconds": "nan"}, "invalid_request"),
        ({"seconds": "soon"}, "invalid_request"),
        ({"seconds": "5001"}, "invalid_request"),
        ({"keep_photos": "yes"}, "invalid_request"),
        ({"name": "x" * 65}, "invalid_request"),
        ({"name": "a\x00b"}, "invalid_request"),
        ({"fusion": "median"}, "invalid_request"),
        ({"prompt": "portrait"}, "invalid_request"),
        ({"name": ["a", "b"]}, "malformed_body"),
        ({f"field{number}": "x" for number in range(101)}, "malformed_body"),
    ],
)
def test_a_form_is_as_strict_as_json(house, fields, code):
    """A field of a form that means nothing, or too much, is refused, and nothing is stored."""
    answer = house.send(("POST", ADDRESS, {"files": files(BYTES), "data": fields}))
    assert answer.json()["code"] == code
    assert house.keys() == []


@pytest.mark.parametrize(
    "body",
    [
        {"seconds": 5001},
        {"seconds": 0},
        {"keep_photos": 1},
        {"keep_photos": True, "photos": ["https://example.com/a.jpg"]},
        {"identity": "0" * 32},
        {"name": ""},
        {"photos": []},
    ],
)
def test_bad_fields_are_named(house, body):
    """What cannot be meant is 422, and nothing is stored."""
    answer = house.add(**body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert house.keys() == []


def test_eight_photos_and_no_more(house):
    """One identity takes up to eight photos, in either form."""
    assert len(house.add(photos=[A_FACE] * 8).json()["faces"]) == 8
    assert len(house.send(("POST", ADDRESS, {"files": files(BYTES * 4)})).json()["faces"]) == 8
    for answer in (house.add(photos=[A_FACE] * 9), house.send(("POST", ADDRESS, {"files": files([b"x"] * 9)}))):
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "photos")


def test_a_photo_without_a_face_is_named(house):
    """The error says which photo it is, as this body calls it, and nothing is stored."""
    answer = house.add(photos=[A_FACE, NO_FACE])
    assert (answer.status_code, answer.json()["code"]) == (422, "no_face")
    assert answer.json()["detail"].startswith("photos[1] ")
    assert house.keys() == []


def test_too_many_bytes_are_not_read(house):
    """A body beyond the limit is 413 in either form, whatever its length says."""

    async def endless(boundary=b""):
        yield boundary
        for _ in range(200):
            yield b"A" * 1000
        raise AssertionError("read on beyond the limit")

    part = b'--x\r\nContent-Disposition: form-data; name="photos"; filename="a"\r\n\r\n'
    form = {"content": endless(part), "headers": {"content-type": "multipart/form-data; boundary=x"}}
    json_body = {"content": endless(), "headers": {"content-type": "application/json"}}
    told = {"files": files([b"A" * 200_000])}
    for options in (form, json_body, told):
        answer = house.send(("POST", ADDRESS, options))
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'--x\r\nContent-Disposition: form-data; name="photos"; filename="a"\r\n\r\nabc', "boundary=x"),  # cut off
        (b"--y\r\n", "boundary=x"),
        (b"--x\r\n\r\nabc\r\n--x--", "boundary=x"),
        (b"abc", ""),
        (b"", "boundary=x"),
        (b"--x--", "boundary=" + "x" * 5000),
    ],
)
def test_a_broken_form_is_told(house, content, kind):
    """What is no whole form is 400."""
    headers = {"content-type": f"multipart/form-data; {kind}"}
    answer = house.send(("POST", ADDRESS, {"content": content, "headers": headers}))
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_body")


def test_another_tenant_is_told_nothing(house):
    """To others an identity is as one that never was: read, erased, listed or named in a request."""
    identity_id = house.add(tenant="ours").json()["id"]
    for tenant in ("", "theirs"):
        assert_missing(house.get(f"/{identity_id}", tenant=tenant))
        assert_missing(house.get(f"/{identity_id}", "DELETE", tenant))
        assert house.get(tenant=tenant).json() == {"identities": []}
        with pytest.raises(IdentityNotFound):
            house.store.load(identity_id, tenant)
    assert house.get(f"/{identity_id}", tenant="ours").status_code == 200
    assert house.get("/..%2Fours%2F" + identity_id, tenant="theirs").status_code == 404
    assert_missing(house.get(f"/{'0' * 33}"))


def test_an_identity_ends(house):
    """At its time it is gone at once, for reads and for requests, and the next sweep erases all of it."""
    short = house.add(seconds=50, keep_photos=True).json()["id"]
    usual = house.add(tenant="t").json()["id"]
    house.now += 49.9
    assert house.get(f"/{short}").status_code == 200
    assert house.store.sweep() == 0
    house.now += 0.1
    assert_missing(house.get(f"/{short}"))
    assert house.get().json() == {"identities": []}
    with pytest.raises(IdentityNotFound):
        house.store.load(short)
    assert house.store.sweep() == 1
    assert house.keys("identities/_/") == []
    house.now += 950
    assert house.store.sweep() == 1
    assert_missing(house.get(f"/{usual}", tenant="t"))
    assert house.keys() == []


def test_a_sweep_removes_what_never_became_an_identity(house):
    """Tokens whose record was never written go after an hour; a damaged record is left, and stops nobody's erasing."""
    identity_id = house.add().json()["id"]
    house.objects.create(f"identities/_/{new_id()}.safetensors", b"tokens of a process that died")
    house.objects.create("identities/_/" + "f" * 32 + ".json", b"{")
    house.now = int(identity_id[:12], 16) / 1000 + ORPHAN_SECONDS - 60  # ids are made by the clock of the machine
    assert house.store.sweep() == 0
    house.now += 120
    assert house.opened().sweep() == 1
    assert len(house.keys()) == 3
    with pytest.raises(StoreCorrupt):
        house.store.record("f" * 32)


def test_erasing_leaves_nothing(house):
    """DELETE removes record, tokens and photos, at once and for good."""
    other = house.add().json()["id"]
    identity_id = house.add(photos=[A_FACE, OTHER_FACE], keep_photos=True).json()["id"]
    assert len(house.keys(f"identities/_/{identity_id}")) == 4
    assert house.objects.get(f"identities/_/{identity_id}-1.photo").data == BYTES[1]
    answer = house.get(f"/{identity_id}", "DELETE")
    assert (answer.status_code, answer.content) == (204, b"")
    assert house.keys(f"identities/_/{identity_id}") == []
    assert_missing(house.get(f"/{identity_id}"))
    assert_missing(house.get(f"/{identity_id}", "DELETE"))
    assert house.get(f"/{other}").status_code == 200


def test_neither_photo_nor_embedding_leaves(house, caplog):
    """No answer, record or log holds a photo or a number of the embedding; photos are stored only where asked."""
    caplog.set_level("DEBUG")
    answer = house.add(photos=[A_FACE, OTHER_FACE])
    identity_id = answer.json()["id"]
    assert house.keys() == [f"identities/_/{identity_id}.json", f"identities/_/{identity_id}.safetensors"]
    record = house.objects.get(f"identities/_/{identity_id}.json").data.decode()
    embedding = house.identities._stages.faces.detect(NewIdentity(photos=[A_FACE]).person, 0).faces[0].embedding
    numbers = [str(value)[:7] for array in (embedding, house.tokens(identity_id)[0]) for value in array[:100]]
    for text in (answer.text, record, house.get().text, caplog.text):
        assert not [number for number in numbers if number in text]
        assert A_FACE not in text


def test_whoever_goes_away_leaves_nobody_behind(house):
    """A caller who is gone before the answer never learns the id: nothing stays in the store."""
    writing, go_on = threading.Event(), threading.Event()

    class Slow(LocalObjects):
        def create(self, key, data, media_type="application/json"):
            writing.set()
            assert go_on.wait(10)
            return super().create(key, data, media_type)

    slow = IdentityStore(Slow(house.folder), IdentitySettings(), lambda: house.models)

    async def go_away():
        adding = asyncio.ensure_future(
            Identities(slow, Stages(house.settings)).add(NewIdentity(photos=[Photo(base64=A_FACE)]), "")
        )
        await asyncio.to_thread(writing.wait, 10)
        adding.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await adding

    asyncio.run(go_away())
    assert writing.is_set()
    assert house.keys() == []


def test_sixteen_at_once(house):
    """Sixteen callers store sixteen identities."""
    bodies = [{"photos": [base64.b64encode(b"face %d" % number).decode()]} for number in range(16)]
    answers = house.send(*(("POST", ADDRESS, {"json": body}) for body in bodies))
    ids = {answer.json()["id"] for answer in answers}
    assert len(ids) == 16
    assert {entry["id"] for entry in house.get().json()["identities"]} == ids
    assert len({house.tokens(identity_id).tobytes() for identity_id in ids}) == 16


def test_a_request_names_it_in_the_place_of_photos(house):
    """The picture is that of the photos to the byte, and neither faces nor identity are worked on again."""
    identity_id = house.add().json()["id"]
    fields = {"prompt": "portrait", "width": 256, "height": 256, "seed": 5}
    text, denoise = FakeText(house.settings).encode, FakeDenoise(house.settings).denoise

    def never(*_):
        raise AssertionError("a stored person was read again")

    named = Request.model_validate({**fields, "people": [{"identity": identity_id, "id_weight": 0.5}]})
    stored = asyncio.run(house.identities.named(named, ""))
    (picture,) = flow.chain(named, flow.Stages(never, never, text, denoise, stored))
    photos = Request.model_validate({**fields, "people": [{"photos": [A_FACE], "id_weight": 0.5}]})
    stages = flow.Stages(FakeFaces(house.settings).detect, FakeIdentity(house.settings).encode, text, denoise)
    assert picture.data == flow.chain(photos, stages)[0].data
    assert picture.faces[0][0].box == (1.0, 2.0, 30.0, 40.0)
    assert {key: picture.trace.models[key] for key in MODELS} == MODELS
    record = flow.generate(named, flow.Stages(never, never, text, denoise, house.store.load), memory_store()).record
    assert record["faces"][0][0]["score"] == 0.75


@pytest.mark.parametrize(("outdated", "error"), [(False, IdentityNotFound), (True, IdentityOutdated)])
def test_what_cannot_be_named_is_told_by_its_person(house, outdated, error):
    """An identity that is not there, or was made by other models, is refused before any stage starts."""
    identity_id = house.add().json()["id"] if outdated else "0" * 32
    house.models["identity"] = "12"
    people = [{"photos": [A_FACE]}, {"identity": identity_id}]
    request = Request.model_validate({"prompt": "portrait", "people": people})

    def never(*_):
        raise AssertionError("a stage has started")

    for stored in (house.opened().load, asyncio.run(Identities(house.opened(), None).named(request, ""))):
        with pytest.raises(error, match=r"^people\[1\]\.identity: "):
            flow.chain(request, flow.Stages(never, never, never, never, stored))


def test_damaged_tokens_are_noticed(house):
    """Tokens that are not those that were written are an error, and never a picture of nobody."""
    identity_id = house.add().json()["id"]
    key = f"identities/_/{identity_id}.safetensors"
    found = house.objects.get(key)
    house.objects.replace(key, found.data[:-4] + b"abcd", found.etag)
    with pytest.raises(StoreCorrupt):
        house.store.load(identity_id)


def test_the_document_describes_the_routes(house):
    """GET /openapi.json has both forms of the body, and the answers."""
    document = house.send(("GET", "/openapi.json", {})).json()
    post = document["paths"][ADDRESS]["post"]
    assert set(post["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert set(NewIdentity.model_fields) == set(
        post["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    )
    assert {"201", "413", "422"} <= set(post["responses"])


def test_with_the_real_networks(tmp_path):
    """What the miniature reads in a photo comes back as it was, and the files in use are those that read it."""
    settings = Settings(device="cpu")
    store = IdentityStore(LocalObjects(tmp_path), IdentitySettings(), lambda: models_in_use(settings))
    buffer = io.BytesIO()
    Image.fromarray(data.astronaut()).save(buffer, "PNG")
    new = NewIdentity.model_validate({"photos": [base64.b64encode(buffer.getvalue()).decode()]})
    faces = FaceDetector.load(settings).detect(new.person, 0)
    identity = IdentityEncoder.load(settings).encode(faces, new.fusion)
    record = store.save(new_id(), new, faces, identity)
    loaded = store.load(record["id"])
    np.testing.assert_array_equal(loaded.tokens, identity.tokens)
    assert json.dumps(record)
    assert record["similarity"] == [[1.0]]
