import asyncio
import json

import httpx
import pytest

from deployments.api import create_api
from deployments.body import MAX_SEPARATORS
from deployments.problems import leaves
from pipeline import errors
from pipeline.request import Request
from pipeline.settings import LimitSettings, Settings
from pipeline.stored import Content
from tests.fakes import A_FACE, NO_FACE
from tests.loopback import HERE
from tests.service import InProcess

SECRET = "a very private wish"
SMALL = {"prompt": "portrait", "width": 256, "height": 256, "seed": 5, "people": [{"photos": [A_FACE]}]}
JSON = {"content-type": "application/json"}
LIMITS = LimitSettings(max_body_bytes=200_000, request_seconds=5, retry_after_seconds=7)


class Service(InProcess):
    """The service in one process; `failure` is raised instead of making pictures."""

    def __init__(self, folder, failure=None):
        super().__init__(Settings(weights_dir=folder))
        self.failure = failure
        self.cancelled = self.waiting = False

    async def make(self, request, tenant, expires, progress=None):
        if self.failure is None:
            return await super().make(request, tenant, expires, progress)
        if self.failure is asyncio.Event:
            self.waiting = True
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled = True
        raise self.failure

    async def content(self, image_id, number, tenant=""):
        content = await super().content(image_id, number, tenant)
        return Content(content.media_type, link=f"https://s3.example/{number}") if number == 3 else content

    async def health(self):
        if self.failure is not None:
            raise self.failure
        return await super().health()


@pytest.fixture
def send(tmp_path):
    """Sends one request to the API of a service, without a network."""
    calm = Service(tmp_path)

    def send(method, path, service=calm, limits=LIMITS, **options):
        async def go():
            transport = httpx.ASGITransport(create_api(service, Settings(limits=limits)))
            async with httpx.AsyncClient(transport=transport, base_url=HERE) as client:
                return await client.request(method, path, **options)

        return asyncio.run(go())

    return send


@pytest.fixture
def post(send):
    return lambda content, headers=JSON, **more: send("POST", "/v1/images", content=content, headers=headers, **more)


def assert_problem(response, status, code):
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    problem = response.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["title"]
    assert problem["detail"]
    assert problem["type"] == f"/problems/{code}"
    assert problem["instance"].startswith("urn:uuid:")
    return problem


def test_a_picture_and_all_that_belongs_to_it(send, post):
    """The answer names pictures, seeds, faces and timings, and its addresses lead to record and pixels."""
    response = post(json.dumps({**SMALL, "num_outputs": 2}))
    answer = response.json()
    assert response.status_code == 200
    assert [image["seed"] for image in answer["images"]] == [5, 6]
    assert answer["images"][1]["url"] == f"/v1/images/{answer['id']}/1"
    assert answer["faces"] == [[{"photo": 0, "box": [1.0, 2.0, 30.0, 40.0], "score": 0.75}]]
    assert answer["timings"].keys() == {"faces", "identity", "text", "queue", "denoise", "store", "total"}
    pixels = send("GET", answer["images"][0]["url"])
    assert pixels.content.startswith(b"\x89PNG")
    assert pixels.headers["content-type"] == "image/png"
    assert pixels.headers["x-content-type-options"] == "nosniff"
    record = send("GET", answer["record"])
    assert record.json()["request"]["prompt"] == "portrait"
    assert A_FACE not in record.text


def test_the_answer_may_be_the_picture_itself(post):
    """With Accept: image/* one request gives the pixels, and says where they and their record are."""
    response = post(json.dumps(SMALL), headers={**JSON, "accept": "image/png, image/*;q=0.8"})
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert response.content.startswith(b"\x89PNG")
    address = response.headers["content-location"].removesuffix("/0")
    assert address.startswith("/v1/images/")
    assert response.headers["link"] == f'<{address}>; rel="describedby"'


def test_pixels_elsewhere_are_a_redirect(send, post):
    """A store that gives links has its pixels fetched there, by a link that no cache keeps."""
    answer = post(json.dumps({**SMALL, "num_outputs": 4})).json()
    response = send("GET", answer["images"][3]["url"])
    assert (response.status_code, response.headers["location"]) == (307, "https://s3.example/3")
    assert response.headers["cache-control"] == "no-store"


BODIES = {
    "none": (b"", "malformed_body"),
    "not JSON": (b"{prompt: 1}", "malformed_body"),
    "two values": (b"{} {}", "malformed_body"),
    "a list": (b"[]", "malformed_body"),
    "null": (b"null", "malformed_body"),
    "NaN": (b'{"prompt": "x", "id": NaN}', "malformed_body"),
    "Infinity": (b'{"prompt": "x", "seed": -Infinity}', "malformed_body"),
    "huge integer": (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "malformed_body"),
    "duplicate key": (b'{"prompt": "x", "prompt": "y"}', "malformed_body"),
    "nested duplicate": (b'{"prompt": "x", "people": [{"face": 1, "face": 2}]}', "malformed_body"),
    "invalid UTF-8": (b'{"prompt": "\xff"}', "malformed_body"),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), "malformed_body"),
    "byte order mark": (b'\xef\xbb\xbf{"prompt": "x"}', "malformed_body"),
    "deep lists": (b"[" * (MAX_SEPARATORS - 10), "malformed_body"),
    "deep objects": (b'{"a":' * (MAX_SEPARATORS // 4), "malformed_body"),
    "many values": (b"[" + b"0," * (MAX_SEPARATORS + 1) + b"0]", "malformed_body"),
    "float overflow": (b'{"prompt": "x", "true_cfg": 1e999}', "invalid_request"),
    "lone surrogate": (b'{"prompt": "\\ud800"}', "invalid_request"),
    "NUL": (b'{"prompt": "a\\u0000b"}', "invalid_request"),
    "zero width": ('{"prompt": "a\u200bb"}'.encode(), "invalid_request"),
    "right to left": ('{"prompt": "a\u202eb"}'.encode(), "invalid_request"),
    "empty prompt": (b'{"prompt": " "}', "invalid_request"),
    "long prompt": (b'{"prompt": "' + b"x" * 90_000 + b'"}', "invalid_request"),
    "empty": (b"{}", "invalid_request"),
    "unknown field": (b'{"prompt": "x", "stepz": 3}', "invalid_request"),
    "number as text": (b'{"prompt": "x", "num_steps": "28"}', "invalid_request"),
    "true as number": (b'{"prompt": "x", "num_steps": true}', "invalid_request"),
    "prompt as list": (b'{"prompt": ["x"]}', "invalid_request"),
    "photo as number": (b'{"prompt": "x", "people": [{"photos": [3]}]}', "invalid_request"),
    "face in words": (b'{"prompt": "x", "people": [{"photos": ["AAAA"], "face": "my face"}]}', "invalid_request"),
    "bad base64": (b'{"prompt": "x", "people": [{"photos": ["%%%%"]}]}', "photo_unreadable"),
    "stored identity": (b'{"prompt": "x", "people": [{"identity": "abc"}]}', "identity_not_found"),
    "no face": (json.dumps({"prompt": "x", "people": [{"photos": [NO_FACE]}]}).encode(), "no_face"),
}
STATUS = {"malformed_body": 400}


@pytest.mark.parametrize(("content", "code"), BODIES.values(), ids=BODIES)
def test_a_bad_body_gets_a_code_and_a_sentence(post, content, code):
    """None of them gets a 500, hangs, or a picture."""
    assert_problem(post(content), STATUS.get(code, 422), code)


def test_every_wrong_field_is_named_and_nothing_is_repeated(post):
    """`errors` says where and what; neither values nor strange names come back."""
    body = {"prompt": "", "num_steps": 99, SECRET: 1, "people": [{"photos": [SECRET], "face": SECRET, "id_weight": -1}]}
    response = post(json.dumps(body))
    fields = {error["field"] for error in assert_problem(response, 422, "invalid_request")["errors"]}
    assert fields == {"prompt", "num_steps", "(body)", "people[0].face", "people[0].id_weight"}
    assert SECRET not in response.text
    assert "there is no such field" in response.text


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json; charset=utf-16"},
        {**JSON, "content-encoding": "gzip"},
        {**JSON, "content-encoding": "br"},
    ],
)
def test_only_plain_json_is_read(post, headers):
    """Other types and compressed bodies are refused before they are read."""
    assert_problem(post(b'{"prompt": "x"}', headers=headers), 415, "unsupported_content_type")


def padded(size):
    return b'{"prompt": ""' + b" " * (size - 14) + b"}"


def test_a_body_may_have_the_limit_and_not_one_byte_more(post):
    """The limit is exact."""
    assert len(padded(LIMITS.max_body_bytes)) == LIMITS.max_body_bytes
    assert_problem(post(padded(LIMITS.max_body_bytes)), 422, "invalid_request")
    assert_problem(post(padded(LIMITS.max_body_bytes + 1)), 413, "body_too_large")


@pytest.mark.parametrize("length", [None, "10"])
def test_a_body_is_counted_whatever_it_claims(post, length):
    """An endless body, chunked or with a lying Content-Length, is left at the limit."""
    sent = []

    async def endless():
        while True:
            sent.append(1000)
            yield b" " * 1000

    headers = JSON if length is None else {**JSON, "content-length": length}
    assert_problem(post(endless(), headers=headers), 413, "body_too_large")
    assert sum(sent) <= LIMITS.max_body_bytes + 2000


@pytest.mark.parametrize("length", ["200001", "9" * 30])
def test_a_body_that_announces_too_much_is_not_read(post, length):
    """Content-Length is enough to refuse."""

    async def untouched():
        raise AssertionError("the body was read")
        yield b""

    assert_problem(post(untouched(), headers={**JSON, "content-length": length}), 413, "body_too_large")


def test_a_body_that_never_ends_meets_the_deadline(post):
    """A body that stops arriving holds nothing for longer than a request may take."""

    async def stalled():
        yield b"{"
        await asyncio.Event().wait()

    assert_problem(post(stalled(), limits=LimitSettings(request_seconds=0.2)), 504, "deadline_exceeded")


def test_the_deadline_cancels_the_work(tmp_path, post):
    """After request_seconds the caller gets a 504 and the work is cancelled, whatever the headers ask for."""
    service = Service(tmp_path, asyncio.Event)
    headers = {**JSON, "x-request-timeout-seconds": "-1", "x-request-disconnect-disabled": "?1"}
    response = post(json.dumps(SMALL), headers=headers, service=service, limits=LimitSettings(request_seconds=0.2))
    assert_problem(response, 504, "deadline_exceeded")
    assert service.cancelled


def test_beyond_max_requests_the_api_itself_refuses(tmp_path):
    """A full ingress answers with a problem and Retry-After, still tells its health, and is free again afterwards."""
    service = Service(tmp_path, asyncio.Event)
    limits = LimitSettings(max_requests=1, request_seconds=60, retry_after_seconds=7)

    async def go():
        transport = httpx.ASGITransport(create_api(service, Settings(limits=limits)))
        async with httpx.AsyncClient(transport=transport, base_url=HERE) as client:
            first = asyncio.ensure_future(client.post("/v1/images", json=SMALL))
            while not service.waiting:
                await asyncio.sleep(0)
            refused, models = await client.post("/v1/images", json=SMALL), await client.get("/v1/models")
            first.cancel()
            await asyncio.wait([first])
            service.failure = None
            return refused, models, await client.post("/v1/images", json=SMALL)

    refused, models, after = asyncio.run(go())
    assert_problem(refused, 429, "overloaded")
    assert refused.headers["retry-after"] == "7"
    assert (models.status_code, after.status_code) == (200, 200)


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.code)
def test_every_error_has_its_answer(tmp_path, post, caplog, kind):
    """Status and code are the error's; of a fault of ours the caller learns only an id, and the log no prompt."""
    service = Service(tmp_path, kind("folder /models is empty; mend it."))
    response = post(json.dumps({**SMALL, "prompt": SECRET}), service=service)
    problem = assert_problem(response, kind.status, kind.code)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("deployments")]
    assert SECRET not in response.text + "".join(lines)
    if issubclass(kind, errors.Fault):
        assert "/models" not in response.text
        assert [problem["instance"] in line and "/models" in line for line in lines] == [True]
    else:
        assert problem["detail"] == "folder /models is empty; mend it."
    wait = response.headers.get("retry-after")
    assert wait == {errors.Overloaded: "7", errors.WorkerUnavailable: "7", errors.RateLimited: "1"}.get(kind)


def test_what_nobody_foresaw_is_told_and_logged_without_its_words(tmp_path, post, caplog):
    """A bug is a 500 with an id; its message, which may quote a prompt, is neither told nor logged."""
    response = post(json.dumps(SMALL), service=Service(tmp_path, ValueError(SECRET)))
    problem = assert_problem(response, 500, "internal_error")
    assert SECRET not in response.text + caplog.text
    assert "ValueError" in caplog.text
    assert problem["instance"] in caplog.text


def test_a_timeout_inside_is_not_the_deadline(tmp_path, post):
    """A TimeoutError from a bug is a 500, not a 504."""
    assert_problem(post(json.dumps(SMALL), service=Service(tmp_path, TimeoutError())), 500, "internal_error")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/docs/nothing.js", 404, "not_found"),
        ("GET", "/v1/images", 405, "method_not_allowed"),
        ("DELETE", "/healthz", 405, "method_not_allowed"),
        ("GET", "/v1/images/" + "0" * 32, 404, "image_not_found"),
        ("GET", "/v1/images/..%2f..%2fetc%2fpasswd", 404, "not_found"),
        ("GET", "/v1/images/..%5c..", 404, "image_not_found"),
        ("GET", "/v1/images/" + "0" * 32 + "/x", 404, "image_not_found"),
        ("GET", "/v1/images/" + "0" * 32 + "/-1", 404, "image_not_found"),
        ("GET", "/v1/images/" + "0" * 32 + "/%D9%A1", 404, "image_not_found"),
        ("GET", "/v1/images/" + "0" * 32 + "/" + "9" * 5000, 404, "image_not_found"),
        ("GET", "/problems/nothing", 404, "not_found"),
    ],
)
def test_wrong_addresses_are_problems_too(send, method, path, status, code):
    """Unknown routes, methods, ids and numbers answer like everything else."""
    assert_problem(send(method, path), status, code)


def test_numbers_beyond_the_last_picture(send, post):
    """An image has the pictures it has."""
    answer = post(json.dumps(SMALL)).json()
    assert_problem(send("GET", f"{answer['record']}/1"), 404, "image_not_found")


def test_health_and_models(send, tmp_path):
    """Healthy is 200; a store that fails makes it that error's status."""
    assert send("GET", "/healthz").json() == {"status": "ok"}
    ill = Service(tmp_path, errors.StoreUnavailable("no answer"))
    assert_problem(send("GET", "/healthz", service=ill), 503, "store_unavailable")
    assert send("GET", "/v1/models").json()["preset"] == "miniature"


def test_the_type_of_a_problem_is_an_address_that_explains_it(send):
    """GET /problems/{code} says what a code means."""
    answer = send("GET", "/problems/no_face").json()
    assert answer == {"code": "no_face", "status": 422, "title": "No face was found in a photo"}


def test_openapi_describes_request_and_errors(send):
    """The document has the request with all its fields, the answer, every code; and every reference leads somewhere."""
    response = send("GET", "/openapi.json")
    document = response.json()
    schemas = document["components"]["schemas"]
    assert schemas["Request"]["properties"].keys() == Request.model_fields.keys()
    assert "$defs" not in response.text
    for reference in set(response.text.split('"$ref":"')[1:]):
        assert reference.partition('"')[0].removeprefix("#/components/schemas/") in schemas
    make = document["paths"]["/v1/images"]["post"]
    assert make["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Request"}
    for kind in leaves():
        assert f"`{kind.code}`" in make["responses"][str(kind.status)]["description"]
